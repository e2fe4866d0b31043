"""An engine without a model: steps of a known length, pictures made of prompt and seed, failures by directive.

Directives stand in the prompt, in brackets:

| directive | does |
|---|---|
| `[fail:CODE]`, `[fail:CODE@STEP]` | ends with the error of that code, before the first step or after step STEP |
| `[die]`, `[die:N]` | the worker dies after the first step: always, or the first N times that this prompt runs |
| `[hold]` | stays before its last step until `release()` |
| `[garbage]` | gives pixels of a shape that nothing can encode |
| `[alpha]` | gives pictures with an alpha channel |
| `[noise]` | gives noise, which no encoder makes small |
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import re
from collections import Counter, deque
from typing import Any

import numpy as np
from numpy.typing import NDArray

from safelight.core.form import Form, Mode
from safelight.core.params import SamplingParams
from safelight.core.schema import ModelSchema, ModelTaskType
from safelight.errors import CancelledError, NotReadyError, QueueFullError, SafelightError, WorkerLostError, by_code
from safelight.families.flux.params import FluxKontextSamplingParams, FluxSamplingParams
from safelight.families.wan.params import WanImageToVideoSamplingParams, WanSamplingParams
from safelight.runtime.client import EngineClient, EngineStats, GenerationRequest, Output, Progress, State, Ticket

IMAGE_SCHEMA = ModelSchema(
    model="stub/pictures",
    pipeline_name="FluxPipeline",
    task=ModelTaskType.T2I,
    params_cls=FluxSamplingParams,
    defaults={**FluxSamplingParams.defaults, "height": 64, "width": 96, "num_inference_steps": 4},
    size_multiple=16,
)
EDIT_SCHEMA = ModelSchema(
    model="stub/edits",
    pipeline_name="FluxKontextPipeline",
    task=ModelTaskType.TI2I,
    params_cls=FluxKontextSamplingParams,
    defaults={
        **FluxKontextSamplingParams.defaults,
        "height": 64,
        "width": 96,
        "max_area": 64 * 96,
        "num_inference_steps": 4,
    },
    size_multiple=16,
    num_input_images=(0, 1),
)
VIDEO_SCHEMA = ModelSchema(
    model="stub/videos",
    pipeline_name="WanPipeline",
    task=ModelTaskType.T2V,
    params_cls=WanSamplingParams,
    defaults={
        **WanSamplingParams.defaults,
        "height": 32,
        "width": 48,
        "num_frames": 9,
        "fps": 8,
        "num_inference_steps": 4,
    },
    size_multiple=16,
    frame_step=4,
)
IMAGE_TO_VIDEO_SCHEMA = ModelSchema(
    model="stub/moving-pictures",
    pipeline_name="WanImageToVideoPipeline",
    task=ModelTaskType.I2V,
    params_cls=WanImageToVideoSamplingParams,
    defaults=VIDEO_SCHEMA.defaults,
    size_multiple=16,
    num_input_images=(1, 1),
    frame_step=4,
    capabilities=frozenset({"last_image"}),
)


class StubEngine(EngineClient):
    """An engine in the event loop's thread.

    Attributes:
        step_seconds: how long a denoising step takes.
        mode: of the requests that begin now, unless they began before.
        submitted: every request that was let in, in order.
        begun: ids of the requests whose first step began, in order.

    """

    def __init__(
        self,
        schema: ModelSchema = IMAGE_SCHEMA,
        *,
        step_seconds: float = 0.0,
        max_waiting: int = 64,
        max_running: int = 1,
        state: State = "ready",
    ) -> None:
        self.step_seconds, self.cost_seconds = step_seconds, 0.0
        self.mode: Mode = "eager"
        self.submitted: list[GenerationRequest] = []
        self.begun: list[str] = []
        self._schema = schema
        self._state: State = state
        self._max_waiting, self._max_running = max_waiting, max_running
        self._waiting: deque[Ticket] = deque()
        self._running: dict[str, asyncio.Task[None]] = {}
        self._deaths: Counter[str] = Counter()
        self._released = asyncio.Event()

    @property
    def schema(self) -> ModelSchema | None:
        return None if self._state == "loading" else self._schema

    @property
    def state(self) -> State:
        return self._state

    @state.setter
    def state(self, state: State) -> None:
        """Become ready, or not; what waits begins as soon as it may."""
        self._state = state
        self._pump()

    @property
    def stats(self) -> EngineStats:
        restarts, cost_seconds = self._deaths.total(), self.cost_seconds
        return EngineStats(len(self._running), len(self._waiting), num_restarts=restarts, cost_seconds=cost_seconds)

    def submit(self, request: GenerationRequest) -> Ticket:
        if self._state not in ("ready", "restarting"):
            raise NotReadyError(f"the model is not ready: {self._state}")
        if len(self._waiting) >= self._max_waiting:
            raise QueueFullError(f"{self._max_waiting} requests wait already")
        ticket = Ticket(request)
        self.submitted.append(request)
        self._waiting.append(ticket)
        self._pump()
        return ticket

    def cancel(self, request_id: str) -> None:
        if request_id in self._running:
            self._running[request_id].cancel()
        for ticket in [ticket for ticket in self._waiting if ticket.request.request_id == request_id]:
            self._waiting.remove(ticket)
            ticket.fail(CancelledError("the request was cancelled"))
        self._pump()

    def release(self) -> None:
        """Let everything that holds go on, now and later."""
        self._released.set()

    async def aclose(self) -> None:
        """End everything: what runs and what waits is answered with `NotReadyError`."""
        self._state = "draining"
        for ticket in self._waiting:
            ticket.fail(NotReadyError("the server stops"))
        self._waiting.clear()
        tasks = list(self._running.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _pump(self) -> None:
        """Begin what may begin, and tell the others where they stand."""
        while self._state == "ready" and self._waiting and len(self._running) < self._max_running:
            ticket = self._waiting.popleft()
            name = ticket.request.request_id
            task = asyncio.get_running_loop().create_task(self._run(ticket), name=f"stub {name}")
            task.add_done_callback(functools.partial(self._ended, ticket))
            self._running[name] = task
        for position, ticket in enumerate(self._waiting):
            if ticket.progress.queue_position != position:
                ticket.advance(Progress(queue_position=position, num_outputs=ticket.progress.num_outputs))

    async def _run(self, ticket: Ticket) -> None:
        try:
            outputs = await self._attempt(ticket)
        except SafelightError as error:
            ticket.fail(error)
        else:
            ticket.finish(outputs)

    def _ended(self, ticket: Ticket, task: asyncio.Task[None]) -> None:
        """Make room; here and not in `_run`, which never begins if it is cancelled at once."""
        del self._running[ticket.request.request_id]
        if task.cancelled():
            stopping = self._state == "draining"
            ticket.fail(NotReadyError("the server stops") if stopping else CancelledError("the request was cancelled"))
        self._pump()

    async def _attempt(self, ticket: Ticket) -> list[Output]:
        parts = ticket.request.params.split()
        steps = parts[0].num_inference_steps or 1
        self.begun.append(ticket.request.request_id)
        form = ticket.request.form or Form(self.mode)
        outputs = []
        for index, params in enumerate(parts):
            assert isinstance(params.prompt, str)
            for step in range(steps):
                done = index * steps + step
                total, count = steps * len(parts), len(parts)
                ticket.advance(Progress("running", None, "denoising", done, total, index, count, form=form))
                await self._obey(params.prompt, step, steps)
                await asyncio.sleep(self.step_seconds)
                self.on_step(self.step_seconds, 1)
            outputs.append(make_output(params, steps * self.step_seconds))
        return outputs

    async def _obey(self, prompt: str, step: int, steps: int) -> None:
        for code, at in re.findall(r"\[fail:(\w+)(?:@(\d+))?\]", prompt):
            if step == int(at or 0):
                raise by_code(code)(f"the stub was told to fail: {code}")
        for times in re.findall(r"\[die(?::(\d+))?\]", prompt):
            if step == 1 and (not times or self._deaths[prompt] < int(times)):
                self._deaths[prompt] += 1
                raise WorkerLostError("the worker was lost")
        if "[hold]" in prompt and step == steps - 1:
            await self._released.wait()


def make_output(params: SamplingParams, seconds: float = 0.0) -> Output:
    """Return the picture or video that the stub makes of one prompt and seed: always the same."""
    assert params.seed is not None
    shown: dict[str, Any] = {name: _as_json(value) for name, value in params.described().items()}
    return Output([make_media(params)], params.seed, shown, {"denoising": seconds})


def make_media(params: SamplingParams) -> NDArray[np.uint8]:
    """Return uint8 [H, W, C] or [T, H, W, 3]."""
    prompt, height, width = str(params.prompt), params.height or 64, params.width or 64
    if "[garbage]" in prompt:
        return np.zeros((3,), np.uint8)
    digest = hashlib.sha256(f"{prompt}\0{params.seed}".encode()).digest()
    random = np.random.default_rng(list(digest))
    channels = 4 if "[alpha]" in prompt else 3
    if "[noise]" in prompt:
        return random.integers(0, 256, (*_frames(params), height, width, channels), np.uint8)
    tiles = random.integers(0, 256, (4, 4, channels), np.uint8)
    picture = tiles[np.arange(height) * 4 // height][:, np.arange(width) * 4 // width]
    if not params.num_frames:
        return picture
    return np.stack([np.roll(picture, 2 * frame, axis=1) for frame in range(params.num_frames)])


def _frames(params: SamplingParams) -> tuple[int, ...]:
    return (params.num_frames,) if params.num_frames else ()


def _as_json(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_as_json(entry) for entry in value]
    return value
