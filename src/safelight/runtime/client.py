"""What the API process knows of an engine: requests go in, progress and outputs come back. Imports no torch."""

from __future__ import annotations

import asyncio
import itertools
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from safelight.core.form import Form
from safelight.core.params import SamplingParams
from safelight.core.schema import ModelSchema
from safelight.core.sound import Sound
from safelight.core.tenant import NOBODY, Tenant
from safelight.errors import SafelightError
from safelight.runtime.video_files import SpooledFrames

State = Literal["loading", "ready", "restarting", "failed", "draining"]


Media = NDArray[np.uint8] | SpooledFrames
"""A picture, or a video that may lie in a file."""


@dataclass(frozen=True)
class GenerationRequest:
    """One request, of one output or several.

    Attributes:
        request_id: unique among those that live.
        params: resolved: checked, with the model's defaults and a seed; images are PIL images.
        priority: higher goes first, but for what is owed to the longest request, the oldest, and each tenant.
        deadline: seconds from its submission after which it is not begun any more; None is no deadline.
        form: in which it began before, in another life of the server; None where it has not begun.
        tenant: whose it is.

    """

    request_id: str
    params: SamplingParams
    priority: int = 0
    deadline: float | None = None
    form: Form | None = None
    tenant: Tenant = NOBODY


@dataclass(frozen=True)
class Progress:
    """How far a request is.

    Attributes:
        state: whether it waits for its first unit of work, or has begun.
        queue_position: requests before it, while it waits.
        stage: the stage that runs.
        step: denoising steps done, over all outputs.
        num_inference_steps: denoising steps in all, over all outputs; 0 while that is not known.
        output_index: which output is being made, from 0.
        num_outputs: how many there will be.
        seconds_left: the engine's estimate; None while there is none.
        form: in which its model calls are made; None until it has begun.
        arrays: what there is to see of it so far.

    """

    state: Literal["queued", "running"] = "queued"
    queue_position: int | None = None
    stage: str = ""
    step: int = 0
    num_inference_steps: int = 0
    output_index: int = 0
    num_outputs: int = 1
    seconds_left: float | None = None
    form: Form | None = None
    arrays: tuple[Media, ...] = field(default=(), compare=False)

    @property
    def percent(self) -> int:
        """Whole percents of the steps; 100 is for who has the outputs."""
        return min(99, 100 * self.step // self.num_inference_steps) if self.num_inference_steps else 0


@dataclass(frozen=True)
class Output:
    """One finished output: one prompt, one seed.

    Attributes:
        media: uint8; pictures [H, W, C] of 1, 3 or 4 channels, or videos [T, H, W, C], long ones in files.
        seed: of its noise.
        params: resolved, for this output alone, as JSON can hold them; images by their sizes.
        timings: seconds of each stage.
        warnings: what the user should know.
        sounds: of the videos, in their order, or alone.

    """

    media: list[Media]
    seed: int
    params: Mapping[str, Any]
    timings: Mapping[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    sounds: list[Sound] = field(default_factory=list)

    def pictures(self) -> list[NDArray[np.uint8]]:
        """Return what is no video: pictures, and whatever else no encoder of pictures will take."""
        return [array for array in self.media if isinstance(array, np.ndarray) and array.ndim != 4]

    def videos(self) -> list[tuple[Media, Sound | None]]:
        """Return the videos, each with its sound."""
        videos = [array for array in self.media if len(array.shape) == 4]
        return list(itertools.zip_longest(videos, self.sounds[: len(videos)]))

    def alone(self) -> list[Sound]:
        """Return the sounds that have no video."""
        return self.sounds[len(self.videos()) :]


def total_timings(outputs: Sequence[Output]) -> dict[str, float]:
    """Return the seconds of each stage, over all outputs."""
    total: dict[str, float] = {}
    for output in outputs:
        for stage, seconds in output.timings.items():
            total[stage] = total.get(stage, 0.0) + seconds
    return total


@dataclass(frozen=True)
class EngineStats:
    """What metrics ask of an engine.

    Attributes:
        num_running: requests that have begun.
        num_waiting: requests that have not.
        device_memory_bytes: allocated by the worker on its device; 0 on the CPU.
        load_seconds: what loading the model took.
        warm_up_seconds: what the small request took that was run before the first of a user; 0 where none was run.
        num_restarts: workers started after the first.
        compiled: whether what begins now runs compiled.
        cost_seconds: that a unit of cost takes (`runtime/cost.py`) in the fastest step so far; 0 before the first.

    """

    num_running: int = 0
    num_waiting: int = 0
    device_memory_bytes: int = 0
    load_seconds: float = 0.0
    warm_up_seconds: float = 0.0
    num_restarts: int = 0
    compiled: bool = False
    cost_seconds: float = 0.0


class Ticket:
    """A submitted request, as its submitter sees it. Only for the event loop's thread.

    Attributes:
        request: what was submitted.
        progress: the latest.

    """

    def __init__(self, request: GenerationRequest) -> None:
        self.request = request
        self.progress = Progress(num_outputs=len(request.params.split()))
        self._result: asyncio.Future[list[Output]] = asyncio.get_running_loop().create_future()
        self._changed = asyncio.Event()

    @property
    def done(self) -> bool:
        """Whether it has its one answer: outputs, or an error."""
        return self._result.done()

    @property
    def waits(self) -> bool:
        """Whether it has not begun."""
        return not self.done and self.progress.state == "queued"

    async def result(self) -> list[Output]:
        """Wait for the outputs, one a prompt and seed.

        Raises:
            SafelightError: what ended the request instead.

        """
        return await asyncio.shield(self._result)

    async def changes(self) -> AsyncIterator[Progress]:
        """Yield the progress now and after each change, until the request is done; a slow reader skips some."""
        while not self.done:
            changed = self._changed
            yield self.progress
            if not self.done and changed is self._changed:
                await changed.wait()

    def advance(self, progress: Progress) -> None:
        """Tell how far it is."""
        self.progress = progress
        self._wake()

    def finish(self, outputs: list[Output]) -> None:
        """Answer with outputs; a second answer is a mistake of ours."""
        self._result.set_result(outputs)
        self._wake()

    def fail(self, error: SafelightError) -> None:
        """Answer with an error."""
        self._result.set_exception(error)
        self._result.exception()  # whoever asked may have gone
        self._wake()

    def _wake(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()


def untold(*what: object) -> None:
    """Hear of something, where nobody wants to."""


class EngineClient(ABC):
    """An engine, wherever it runs. Its methods are for the event loop's thread and never wait.

    Attributes:
        on_step: told of each denoising step: its seconds, and how many outputs shared it.

    """

    on_step: Callable[[float, int], None] = staticmethod(untold)

    @property
    @abstractmethod
    def schema(self) -> ModelSchema | None:
        """What the model takes; None until it has been loaded once."""

    @property
    @abstractmethod
    def state(self) -> State:
        """Whether it works."""

    @property
    @abstractmethod
    def stats(self) -> EngineStats:
        """Figures for metrics."""

    @abstractmethod
    def submit(self, request: GenerationRequest) -> Ticket:
        """Put a request into the queue. It ends in exactly one answer, through a worker's death as well.

        Raises:
            QueueFullError: if as many wait as may.
            NotReadyError: if the model is not loaded, or the server stops.

        """

    @abstractmethod
    def cancel(self, request_id: str) -> None:
        """End a request within one step, with `CancelledError`; nothing happens if it is done, or unknown."""
