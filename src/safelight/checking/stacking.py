"""Calls of two requests as one forward, beside each alone: what `shared_kwargs` and `call_signature` promise."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from safelight.checking.record import Kind, Recorded, tensors_of
from safelight.checking.report import DIVERGES, Row, compare_recorded, shapes
from safelight.core.calls import ModelCall
from safelight.core.executor import Execution
from safelight.core.params import SamplingParams
from safelight.core.pipeline import ComposedPipeline
from safelight.core.request import Req
from safelight.runtime.worker.stacking import split, stack

SHARED = "`shared_kwargs` of the config"


@dataclass(frozen=True)
class Step:
    """The calls of one step of a request, and the rows that its latents have."""

    calls: list[ModelCall]
    num_rows: int


def stacking_rows(pipeline: ComposedPipeline, params: SamplingParams, tolerance: float) -> list[Row]:
    """Return a row for each guidance branch of a step: stacked with another request's, against alone.

    The other request differs in all that requests of one signature may: its seed, its scales, the step that it is at,
    and its text, where another one of as many tokens is found.

    Args:
        pipeline: ours.
        params: resolved, for one output.
        tolerance: as in `compare`.

    """
    step = step_of(pipeline, params, 0)
    other = other_step(pipeline, params, step)
    branches = {call.key.branch: call for call in other.calls}
    return [stacked_row(pipeline, step, call, branches.get(call.key.branch), tolerance) for call in step.calls]


def other_step(pipeline: ComposedPipeline, params: SamplingParams, step: Step) -> Step:
    """Return a later step of another request, whose calls have the same signatures where one is found."""
    wanted = [call.signature for call in step.calls]
    found = step
    for text in (*other_texts(params), params.prompt):
        other = dataclasses.replace(params, seed=(params.seed or 0) + 1, prompt=text, **other_scales(params))
        found = step_of(pipeline, other, 1)
        if [call.signature for call in found.calls] == wanted:
            return found
    return found


def other_texts(params: SamplingParams) -> Iterator[str]:
    """Return texts that may have as many tokens as the prompt: its words, and its letters, in another order."""
    if isinstance(params.prompt, str):
        yield " ".join(params.prompt.split(" ")[::-1])
        yield params.prompt.translate(str.maketrans("aeiou", "eioua"))


def other_scales(params: SamplingParams) -> dict[str, Any]:
    """Return another value for each number above 1: scales of guidance, which stay above it."""
    kinds = {name: option.kind for name, option in params.options().items()}
    numbers = {name: value for name, value in params.set_fields().items() if kinds.get(name) == "number"}
    return {name: 1.0625 * value for name, value in numbers.items() if value > 1}


def step_of(pipeline: ComposedPipeline, params: SamplingParams, number: int) -> Step:
    """Return the calls of a step of a request, the last one of a request that has fewer."""
    req = Req("check", params)
    found = Step([], 0)
    with Execution(pipeline, req) as execution:
        while execution.advance() and req.step_index <= number:
            if isinstance(req.latents, Tensor) and req.in_loop:
                found = Step(list(req.pending), len(req.latents))
    return found


def stacked_row(
    pipeline: ComposedPipeline, step: Step, call: ModelCall, other: ModelCall | None, tolerance: float
) -> Row:
    """Return the row of one branch."""
    what = f"{call.component}: {call.key.branch}, stacked with another request"
    fault = None if other is None else fault_of(call, other, step.num_rows)
    if other is None or fault is not None:
        shape = shapes(tuple(call.kwargs.values())[:1])
        return Row(what, shape, None, None, DIVERGES, fault or "the other request has no such branch")
    with torch.inference_mode():
        each = [pipeline.forward(one) for one in (call, other)]
        together = split(pipeline.forward(stack([call, other])), [step.num_rows] * 2)
    mine, wanted = (
        Recorded(tuple(torch.cat(parts) for parts in zip(*map(tensors_of, made), strict=True)), Kind.CLOSE)
        for made in (together, each)
    )
    return compare_recorded(what, mine, wanted, tolerance)


def fault_of(call: ModelCall, other: ModelCall, num_rows: int) -> str | None:
    """Return what is wrong with how two calls say which of their arguments have a batch dimension; None if nothing is.

    Args:
        call, other: of the same branch of two requests.
        num_rows: of each, the size of the batch dimension.

    """
    for name, tensor in call.kwargs.items():
        if not tensor.ndim or tensor.shape[0] != num_rows:
            return (
                f"{name}, {shapes([tensor])}, has no batch dimension of {num_rows}: "
                f"either it is named in {SHARED}, or given one"
            )
    if call.signature != other.signature:
        return f"its call_signature is another, {other.signature}: what differs by row does not belong there"
    if call.kwargs.keys() != other.kwargs.keys() or differing_shapes(call.kwargs, other.kwargs):
        names = differing_shapes(call.kwargs, other.kwargs) or sorted(call.kwargs.keys() ^ other.kwargs.keys())
        return f"{', '.join(names)}: of other sizes there, and call_signature does not tell them apart"
    for name, tensor in call.shared_kwargs.items():
        if not torch.equal(tensor, other.shared_kwargs[name]):
            return f"{name} has other values there, and is in {SHARED}: what differs by request has a batch dimension"
    return None


def differing_shapes(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> list[str]:
    """Return the names of arguments whose sizes differ."""
    return [name for name, tensor in left.items() if name in right and tensor.shape != right[name].shape]
