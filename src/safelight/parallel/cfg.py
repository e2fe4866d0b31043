"""CFG parallelism: the guidance branches of a step run on different ranks."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from safelight.core.executor import Execution, PipelineExecutor, make_call
from safelight.core.pipeline import ComposedPipeline
from safelight.core.request import Prediction, Req
from safelight.parallel.collectives import Communicator

Call = TypeVar("Call")


def run_calls(calls: Sequence[Call], run: Callable[[Call], Prediction], ranks: Communicator) -> list[Prediction]:
    """Make the calls of a step, divided over ranks; return all results on every rank.

    In each round a rank makes one call, and one collective joins the round's results. Where a round has fewer calls
    than there are ranks, some make the same call; one that all make needs no collective.

    Args:
        calls: the branches of a step, the same on every rank. Their results have one shape: that of the latents.
        run: makes a call.
        ranks: along the axis `cfg`.

    """
    results: list[Prediction] = []
    for begin in range(0, len(calls), ranks.size):
        in_turn = calls[begin : begin + ranks.size]
        own = run(in_turn[ranks.rank % len(in_turn)])
        results += [own] if len(in_turn) == 1 else _joined(own, ranks)[: len(in_turn)]
    return results


def _joined(own: Prediction, ranks: Communicator) -> list[Prediction]:
    """Return the results of every rank; the tensors of one go in one piece."""
    if isinstance(own, Tensor):
        return list(ranks.all_gather_list(own))
    sizes = [tensor.numel() for tensor in own]
    assert len({tensor.dtype for tensor in own}) == 1, "the tensors of a result have one dtype"
    gathered = ranks.all_gather_list(torch.cat([tensor.flatten() for tensor in own]))
    pieces = [zip(torch.split(flat, sizes), own, strict=True) for flat in gathered]
    return [tuple(piece.view(like.shape) for piece, like in result) for result in pieces]


class ParallelExecutor(PipelineExecutor):
    """Drives one request to its end, in this thread; every rank drives the same request.

    Args:
        pipeline: this rank's.
        ranks: along the axis `cfg`.

    """

    def __init__(self, pipeline: ComposedPipeline, ranks: Communicator) -> None:
        super().__init__(pipeline)
        self.ranks = ranks

    def execute(self, req: Req) -> Generator[Req, None, None]:
        """Drive a request to its end, yielding after each unit. Closing the iterator stops the work."""
        with Execution(self.pipeline, req) as execution:
            while execution.advance(self._results(req)):
                yield req

    def _results(self, req: Req) -> list[Prediction]:
        """Make the calls that are pending."""
        with torch.inference_mode():
            return run_calls(req.pending, partial(make_call, self.pipeline), self.ranks)
