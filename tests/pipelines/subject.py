"""A pipeline's tiny checkpoint, what is asked of it, and ways to run that through the engine."""

from __future__ import annotations

import dataclasses
import gc
import threading
from collections.abc import Iterator, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from safelight import ServerArgs
from safelight.acceleration.memory import DeviceMemory
from safelight.core.executor import Execution, SyncExecutor
from safelight.core.pipeline import ComposedPipeline
from safelight.core.request import Req
from safelight.loading.loader import load_pipeline
from safelight.runtime.worker.engine import Batching, Engine
from safelight.runtime.worker.model_runner import PipelineRunner
from safelight.testing.models import requests
from safelight.testing.recipes import references_own_warnings
from tests.backends.recipes import requests as asked
from tests.backends.recipes.build import Tiny
from tests.features.runs import Seen, drive, ticking

Media = list[np.ndarray[Any, Any]]


class Subject:
    """A pipeline of the table.

    Args:
        tiny: how its checkpoint is built.
        folder: where.

    Attributes:
        kinds: of media that Diffusers made of it last: `images`, `frames`, `audio`, ...

    """

    def __init__(self, tiny: Tiny, folder: Path) -> None:
        self.tiny, self.folder = tiny, folder
        self.kinds: frozenset[str] = frozenset()
        tiny.write(folder)

    def args(self, **settings: Any) -> ServerArgs:
        """Return an engine's settings: nothing is on but what is given."""
        off = {"conditioning_cache": "0", "kernels": "plain", "backend": "diffusers", "device": "cpu"}
        return ServerArgs(str(self.folder), **{**off, **settings})

    def load(self, memory: DeviceMemory | None = None, **settings: Any) -> ComposedPipeline:
        """Load it."""
        with references_own_warnings():
            return load_pipeline(self.args(**settings), memory)

    @cached_property
    def plain(self) -> ComposedPipeline:
        """The pipeline with everything off."""
        return self.load()

    @cached_property
    def reference(self) -> Any:
        """Diffusers' own."""
        with references_own_warnings():
            pipe = self.tiny.cls.from_pretrained(self.folder)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def expected(self, seed: int, second: bool = False, **others: Any) -> Media:
        """Return what Diffusers makes of a request."""
        fields = {**asked.fields(self.tiny, second), **others}
        generator = torch.Generator().manual_seed(seed)
        with references_own_warnings(), torch.no_grad():
            made = self.reference(**fields, generator=generator, output_type="np")
        self.kinds = frozenset(made.keys())
        return arrays(list(made.to_tuple()))

    def requests(self, pipeline: ComposedPipeline, seed: int, second: bool = False, **others: Any) -> list[Req]:
        """Return the outputs of a request, in the form `np`."""
        return requests(pipeline, {**asked.fields(self.tiny, second), "seed": seed, **others})

    @cache  # noqa: B019 a subject lives as long as its table
    def alone(self, seed: int, second: bool = False) -> Media:
        """Return what a request of one output makes with everything off, when nothing else runs."""
        (req,) = self.requests(self.plain, seed, second)
        return finish(self.plain, req)


def finish(pipeline: ComposedPipeline, req: Req, runner: PipelineRunner | None = None) -> Media:
    """Drive a request to its end, and return what it made."""
    runner = runner or PipelineRunner(pipeline)
    for _ in SyncExecutor(pipeline, runner, runner.form).execute(req):
        pass
    return arrays(req.outputs)


def together(pipeline: ComposedPipeline, reqs: Sequence[Req], batching: Batching = "exact") -> Seen:
    """Drive requests in turns through an engine, and return what was seen."""
    engine, seen = Engine(pipeline, clock=ticking(), batching=batching), Seen()
    tasks = [engine.add(req) for req in reqs]
    drive(engine, seen)
    for task in tasks:
        if task.error is not None:
            raise task.error
    return seen


def arrays(made: Any) -> Media:
    """Return the arrays in what a pipeline made, in order: pictures, videos, sounds and their parts."""
    if isinstance(made, Tensor):
        return [made.numpy()]
    if isinstance(made, np.ndarray):
        return [made]
    if dataclasses.is_dataclass(made):
        made = list(vars(made).values())
    return [array for each in made for array in arrays(each)] if isinstance(made, (list, tuple)) else []


def difference(ours: Media, theirs: Media) -> float:
    """Return the largest difference of two media; infinity where they have not as many values, or have values apart."""
    one, other = (np.concatenate([array.ravel() for array in media]) for media in (ours, theirs))
    if one.shape != other.shape:
        return float("inf")
    apart = np.abs(one.astype(np.float64) - other.astype(np.float64))
    return 0.0 if np.array_equal(one, other, equal_nan=True) else float(np.nan_to_num(apart, nan=np.inf).max())


def count_forwards(pipeline: ComposedPipeline) -> list[int]:
    """Return a list of one number: how many calls of networks the pipeline has made since."""
    forward, made = pipeline.forward, [0]

    def counting(call: Any) -> Any:
        made[0] += 1
        return forward(call)

    pipeline.forward = counting  # type: ignore[method-assign]
    return made


def step_threads() -> int:
    """Return how many threads of pipelines' calls there are."""
    return sum(thread.name == "safelight-step" for thread in threading.enumerate())


def live_tensors() -> int:
    """Return how many tensors are alive."""
    gc.collect()
    return sum(issubclass(type(each), Tensor) for each in gc.get_objects())


def steps_of(execution: Execution) -> Iterator[int]:
    """Drive a request to its end; yield the steps that are done after each unit."""
    while execution.advance():
        yield execution.req.step_index
