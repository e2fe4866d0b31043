"""Whether what a unit takes is there, before it takes it: on one device, of every stage."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from safelight.core.byte_sizes import shown_size
from safelight.core.params import SamplingParams
from safelight.core.pipeline import ComposedPipeline
from safelight.core.request import Req, map_tensors
from safelight.errors import InvalidParameterError, OutOfMemoryError
from safelight.runtime.cost import OF_A_STEP, largest, memory_excess
from safelight.runtime.worker.memory_gauge import Gauge
from safelight.runtime.worker.policy import Task

logger = logging.getLogger(__name__)

LEAST = 64 << 20
"""Bytes of a unit from which it is looked at: what is smaller the libraries take themselves, now and then."""
MOST_OF_A_PIXEL = 16 << 10
"""Bytes that no stage takes for a pixel: where so much would be there, nothing need be counted."""
SPARE = 8
"""Times as much must be there."""
WORTH = 1 << 30
"""Bytes of weights from which a model is counted when it is loaded, and not for the first request that may matter."""
SHARES = (0.75, 2.0)
"""Between which what was measured corrects what was counted."""


class StageEstimator:
    """Knows what the stages of a pipeline's requests take, and what there is.

    What they take is counted on components without weights, at a few sizes, once; and corrected, for each stage, by
    what its largest unit so far took. Memory that other requests hold is taken already, and so is not there.

    Args:
        pipeline: the loaded model.
        gauge: of the memory in which it runs. What is taken now is the model, and nothing else.

    Attributes:
        schema: the pipeline's, with what there is beside the model, and what stages take, once that is known.

    """

    def __init__(self, pipeline: ComposedPipeline, gauge: Gauge) -> None:
        self._pipeline = pipeline
        self._gauge = gauge
        self.schema = dataclasses.replace(pipeline.schema, device_bytes=gauge.ceiling())
        self._is_counted = False
        self._corrections: dict[str, tuple[int, float]] = {}
        if sum(tensor.nbytes for module in pipeline.modules().values() for tensor in module.parameters()) >= WORTH:
            self.count()

    def count(self) -> None:
        """Count, unless that is done."""
        if self._is_counted:
            return
        self._is_counted = True
        try:
            counted = self._pipeline.components.count_memory()
        except Exception:  # a model's boundary: what cannot be run without weights is not counted
            logger.warning("what a request takes of memory cannot be counted", exc_info=True)
            return
        self.schema = dataclasses.replace(self.schema, stage_memory=counted)

    def refusal(self, params: SamplingParams) -> InvalidParameterError | None:
        """Return why a request can never fit; None where it may."""
        self._count_for(params)
        reason = memory_excess(params, self.schema)
        return InvalidParameterError(*largest(params, self.schema, OF_A_STEP), f"less: {reason}") if reason else None

    def check(self, tasks: Sequence[Task]) -> OutOfMemoryError | None:
        """Return why the next unit of tasks, their calls made in common, does not fit now; None if it does."""
        needed = sum(self.needed(task.execution.req) for task in tasks)
        if needed < LEAST:
            return None
        needed -= sum(held_by(task.execution.req, self._pipeline.device) for task in tasks)
        needed += self._pipeline.residency.missing_bytes({call.component for task in tasks for call in task.calls})
        free = self._gauge.free()
        if needed <= free:
            return None
        stage = tasks[0].execution.req.stage
        return OutOfMemoryError(
            f"{stage} needs about {shown_size(needed, up=True)} of memory for this request, and {shown_size(free)} "
            "are free; ask for less at once, or again when less is running"
        )

    def needed(self, req: Req) -> int:
        """Return what the stage of a request takes at most, with all that the request holds; 0 if that is not known."""
        counted = self._counted(req)
        return round(counted * self._corrections.get(req.stage, (0, 1.0))[1])

    @contextlib.contextmanager
    def measured(self, tasks: Sequence[Task]) -> Iterator[None]:
        """Learn from a large unit of one task what its stage takes."""
        req = tasks[0].execution.req
        stage, counted = req.stage, self._counted(req) if len(tasks) == 1 else 0
        if counted < max(LEAST, self._corrections.get(stage, (0, 1.0))[0]):
            yield
            return
        before = self._gauge.begin() - held_by(req, self._pipeline.device)
        yield
        least, most = SHARES
        self._corrections[stage] = (counted, min(most, max(least, (self._gauge.peak() - before) / counted)))

    def _counted(self, req: Req) -> int:
        known = (stage for stage in self.schema.stage_memory if stage.stage == req.stage)
        pixels, tokens = req.params.num_pixels(self.schema), req.params.num_sequence_tokens(self.schema)
        return sum(stage.of(pixels, tokens) for stage in known)

    def _count_for(self, params: SamplingParams) -> None:
        """Count, where a request may be large for the memory that there is: once, which takes some seconds."""
        pixels = params.num_sequence_tokens(self.schema) * self.schema.size_multiple**2
        if not self._is_counted and pixels * MOST_OF_A_PIXEL * SPARE > self._gauge.free():
            self.count()


def held_by(req: Req, device: torch.device) -> int:
    """Return the bytes that a request's tensors take on a device, finished media aside."""
    storages: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        if tensor.device.type == device.type:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    media, req.outputs = req.outputs, []
    map_tensors(req, note)
    req.outputs = media
    return sum(storages.values())
