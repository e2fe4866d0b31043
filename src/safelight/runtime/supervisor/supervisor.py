"""The supervisor: starts the worker, hands it requests, watches it, and starts it again. Imports no torch."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from safelight.core.params import SamplingParams
from safelight.core.schema import ModelSchema
from safelight.core.sound import Sound
from safelight.errors import (
    CancelledError,
    ModelError,
    NotReadyError,
    PortError,
    SafelightError,
    UsageError,
    WorkerLostError,
    WorkerStartError,
    by_code,
)
from safelight.runtime.client import EngineStats, GenerationRequest, Media, Output, State, Ticket, untold
from safelight.runtime.cost import request_cost, step_cost
from safelight.runtime.messages import (
    Cancel,
    Compiled,
    Failed,
    Heartbeat,
    Loaded,
    LoadFailed,
    OutputMade,
    Progressed,
    schema_from_wire,
)
from safelight.runtime.settings import EngineSettings
from safelight.runtime.sockets import LIBRARY, make_folder, remove_folder, require_private
from safelight.runtime.supervisor.group import Rank, WorkerGroup, start_worker
from safelight.runtime.supervisor.live import LiveRequest

logger = logging.getLogger(__name__)

MAX_DEATHS = 3
DEATHS_WINDOW = 300.0
AGAIN_SECONDS = 1.0
"""After a worker that could not even be started, as where the system has no room for another process."""
UNKEPT = "no worker can be kept; the log says more"
LAST_WORDS_SECONDS = 0.5
"""In which what a worker said before it died arrives."""


class Supervisor:
    """One worker, kept alive. Every request that was taken ends in one answer, through the worker's death as well.

    Args:
        settings: of the engine.

    Attributes:
        schema: what the model takes; None until it has been loaded once.
        state: whether it works.
        gave_up: whether workers have died too often.
        on_step: told of each denoising step: its seconds, and how many outputs shared it.
        on_compiled: told, for each worker, that the model is compiled, by an empty string; or why it is not.
        on_lost: told that a worker is lost, once those requests are answered that it was lost with: who listens may
            withdraw the others. Without it they wait for the next worker.
        on_gave_up: told that there will be no other worker.

    """

    def __init__(self, settings: EngineSettings) -> None:
        self.settings = settings
        self.gave_up = asyncio.Event()
        self.on_step: Callable[[float, int], None] = untold
        self.on_compiled: Callable[[str], None] = untold
        self.on_lost: Callable[[Supervisor], None] = untold
        self.on_gave_up: Callable[[], None] = untold
        self.schema: ModelSchema | None = None
        self.state: State = "loading"
        self._stats = EngineStats()
        self._live: dict[str, LiveRequest] = {}
        self._worker: WorkerGroup | None = None  # that is ready; without one, the next is sent every live request
        self._deaths: deque[float] = deque(maxlen=MAX_DEATHS)
        self._ready: asyncio.Future[None] | None = None
        self._task: asyncio.Task[None] | None = None
        self._folder = Path()
        self._closing = self._holds_library = False

    @property
    def stats(self) -> EngineStats:
        """Figures for metrics."""
        waiting = sum(live.ticket.waits for live in self._live.values())
        return replace(self._stats, num_waiting=waiting, num_running=len(self._live) - waiting)

    @property
    def outstanding_cost(self) -> float:
        """What the requests that were taken have left, in latent tokens of denoising steps."""
        return sum(live.remaining_cost for live in self._live.values())

    async def start(self) -> None:
        """Start the worker, and wait until the model is loaded and warm.

        Raises:
            SafelightError: why it cannot be loaded, with the exit code.

        """
        LIBRARY.hold()
        self._holds_library = True
        self._folder = make_folder()
        self._ready = asyncio.get_running_loop().create_future()
        self._task = asyncio.create_task(self._keep_alive())
        self._task.add_done_callback(self._kept)
        try:
            await asyncio.shield(self._ready)
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """Stop the worker; whoever still waits is told so."""
        self.drain()
        self._closing = True
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            remove_folder(self._folder)  # there is one only if it was started
        if self._holds_library:
            self._holds_library = False
            LIBRARY.let_go()
        self._fail_all(NotReadyError("the server stopped before the request was done"))

    def drain(self) -> None:
        """Take no more requests; those that were taken go on."""
        if self.state != "failed":
            self.state = "draining"

    def submit(self, request: GenerationRequest) -> Ticket:
        """Put a request into the queue. It ends in exactly one answer, through a worker's death as well.

        Raises:
            NotReadyError: if the model is not loaded, or the server stops.

        """
        if self.state not in ("ready", "restarting"):
            raise NotReadyError(f"the model is not ready ({self.state})")
        assert request.request_id not in self._live, "two requests have one id"
        assert self.schema is not None, "it has been loaded once"
        cost = request_cost(request.params, self.schema)
        live = LiveRequest(Ticket(request), time.monotonic(), cost, request.form)
        if self._worker is not None:
            self._worker.channel.send(*live.message())
        self._live[request.request_id] = live
        return live.ticket

    def adopt(self, live: LiveRequest) -> None:
        """Take a request that was taken before, whatever waits here: it has its ticket."""
        if self._worker is not None:
            self._worker.channel.send(*live.message())
        self._live[live.ticket.request.request_id] = live

    def withdraw(self) -> list[LiveRequest]:
        """Return the requests that wait for the next worker, and answer for them no more."""
        assert self._worker is None, "a worker has them"
        withdrawn = list(self._live.values())
        self._live.clear()
        return withdrawn

    def cancel(self, request_id: str) -> None:
        """End a request within one step, with `CancelledError`; nothing happens if it is done, or unknown."""
        live = self._live.pop(request_id, None)
        if live is not None:
            if self._worker is not None:
                self._worker.channel.send(Cancel(request_id))
            live.ticket.fail(CancelledError("the request was cancelled"))

    # The worker's life

    async def _keep_alive(self) -> None:
        """Run one worker after another, until too many have died."""
        while not self.gave_up.is_set():
            try:
                await self._run_worker()
            except Exception:  # the supervisor's boundary: whatever it was, it is a death
                logger.exception("no worker can be kept")
                self._lose(set(), WorkerStartError(UNKEPT))
                await self._pause()

    def _kept(self, task: asyncio.Task[None]) -> None:
        """Give up where even the counting of deaths has failed: nothing would start another worker."""
        if not task.cancelled() and task.exception() is not None:
            logger.error("deaths cannot be counted", exc_info=task.exception())
            self._end(WorkerStartError(UNKEPT))

    async def _pause(self) -> None:
        await asyncio.sleep(0 if self.gave_up.is_set() else AGAIN_SECONDS)

    async def _run_worker(self) -> None:
        """Run one worker, to its death."""
        try:
            self._check_folder()
            worker = await start_worker(self._folder, self._stats.num_restarts, self.settings)
        except SafelightError as error:
            logger.error("%s", error)
            self._lose(set(), error)
            await self._pause()
            return
        try:
            reason = await self._serve(worker)
            if self.state == "ready":
                self.state = "restarting"
        finally:
            self._worker = None
            await worker.stop(kindly=self._closing)
        unit = worker.board.read()
        culprits = set(unit.requests) if unit is not None else set()
        logger.error("the worker %s with %s in work", reason, ", ".join(sorted(culprits)) or "no request")
        self._lose(culprits, WorkerStartError(f"the worker {reason} before the model was loaded; the log says more"))
        worker.board.remove()

    def _check_folder(self) -> None:
        try:
            require_private(self._folder)
        except OSError as error:
            raise PortError(f"TMPDIR: {str(self._folder)!r} cannot be used: {error.strerror}") from error

    async def _serve(self, worker: WorkerGroup) -> str:
        """Exchange messages until the worker dies, hangs or gives up; return which, and how."""
        hearing = [asyncio.create_task(self._receive_all(worker))]
        hearing += [asyncio.create_task(self._hear(rank)) for rank in worker.ranks[1:]]
        parts: dict[asyncio.Task[Any], str] = {
            **dict.fromkeys(hearing, "gave up"),
            asyncio.create_task(worker.watch(self.settings)): "hung",
            **{asyncio.create_task(rank.end()): "died" for rank in worker.ranks},
        }
        try:
            done, _ = await asyncio.wait(parts, return_when=asyncio.FIRST_COMPLETED)
            if not worker.ready and not done.intersection(hearing):  # it may have said why
                done |= (await asyncio.wait(hearing, timeout=LAST_WORDS_SECONDS))[0]
            part = next(part for part in parts if part in done)
            if part.exception() is not None:  # the worker's boundary: what it sends must not end the supervisor
                logger.error("a message of the worker's cannot be understood", exc_info=part.exception())
                return "sent nonsense"
            how = part.result()
            return f"{parts[part]} ({how})" if how else parts[part]
        finally:
            for part in parts:
                part.cancel()
            await asyncio.gather(*parts, return_exceptions=True)

    async def _hear(self, rank: Rank) -> None:
        """Hear a rank beside the first until it says that it cannot load."""
        self._load_failed(await rank.hear())

    async def _receive_all(self, worker: WorkerGroup) -> None:
        """Take messages until the worker says that it cannot load."""
        while True:
            message, arrays = await worker.channel.receive()
            worker.ranks[0].was_heard()
            try:
                match message:
                    case Loaded():
                        self._take_loaded(message, worker)
                    case LoadFailed():
                        return self._load_failed(message)
                    case Heartbeat():
                        self._take_heartbeat(message)
                    case Compiled():
                        self._take_compiled(message)
                    case Progressed():
                        self._take_progress(message, arrays)
                    case OutputMade():
                        self._take_output(message, arrays)
                    case Failed() if live := self._live.pop(message.request_id, None):
                        live.ticket.fail(by_code(message.code).rebuilt(message.message, message.param))
            except Exception:  # a request's boundary: what is said of one ends that one
                if not isinstance(message, Progressed | OutputMade | Failed):
                    raise
                logger.exception("a message about request %s cannot be understood", message.request_id)
                worker.channel.send(Cancel(message.request_id))
                self._fail(message.request_id, SafelightError("the request's result cannot be understood"))

    def _lose(self, culprits: set[str], error: SafelightError) -> None:
        """Go on without a worker: answer the requests whose unit ran, and let all others wait for the next worker.

        Args:
            culprits: these requests.
            error: what is said where there never was one.

        """
        if self._ready is not None and not self._ready.done():
            self._end(error)
            return
        self._stats = replace(self._stats, compiled=False)
        for request_id, live in list(self._live.items()):
            if request_id in culprits:
                self._fail(request_id, WorkerLostError("the worker was lost while it worked on this request"))
            else:
                live.begin_again()
        now = time.monotonic()
        self._deaths.append(now)
        is_last = len(self._deaths) == MAX_DEATHS and now - self._deaths[0] < DEATHS_WINDOW
        if is_last:
            self.state = "failed"
        elif self.state != "draining":
            self.state = "restarting"
        self.on_lost(self)
        if is_last:
            logger.error("%d workers died within %.0f s", MAX_DEATHS, DEATHS_WINDOW)
            self._give_up()
        else:
            self._stats = replace(self._stats, num_restarts=self._stats.num_restarts + 1)

    def _end(self, error: SafelightError) -> None:
        """Give up, and tell whoever waits for the first worker why."""
        self._give_up()
        if self._ready is not None and not self._ready.done():
            self._ready.set_exception(error)

    def _give_up(self) -> None:
        self.state = "failed"
        self._fail_all(WorkerLostError("the worker died too often"))
        self.gave_up.set()
        self.on_gave_up()

    def _load_failed(self, message: LoadFailed) -> None:
        if self._ready is not None and not self._ready.done():
            error = UsageError if message.exit_code == UsageError.exit_code else ModelError
            self._end(error.rebuilt(message.message))
        else:
            logger.error("the worker cannot load the model again: %s", message.message)

    # Messages

    def _take_loaded(self, message: Loaded, worker: WorkerGroup) -> None:
        schema = schema_from_wire(message.schema)
        self.schema = replace(schema, model=self.settings.model_name or schema.model)
        load, warm_up = message.load_seconds, message.warm_up_seconds
        self._stats = replace(self._stats, load_seconds=load, warm_up_seconds=warm_up)
        worker.ready, self._worker = True, worker
        if self.state != "draining":
            self.state = "ready"
        for live in self._live.values():
            worker.channel.send(*live.message())
        if self._ready is not None and not self._ready.done():
            self._ready.set_result(None)

    def _take_compiled(self, message: Compiled) -> None:
        self._stats = replace(self._stats, compiled=not message.reason)
        if message.reason:
            logger.warning("the model is not compiled: %s", message.reason)
        self.on_compiled(message.reason)

    def _take_heartbeat(self, message: Heartbeat) -> None:
        self._stats = replace(self._stats, device_memory_bytes=message.device_memory_bytes)
        for request_id, position in message.positions.items():
            live = self._live.get(request_id)
            if live is None or live.ticket.progress.state != "queued":
                continue
            if live.ticket.progress.queue_position != position:
                live.ticket.advance(replace(live.ticket.progress, queue_position=position))

    def _take_progress(self, message: Progressed, arrays: Sequence[Media]) -> None:
        live = self._live.get(message.request_id)
        if message.step_seconds is not None:
            self.on_step(message.step_seconds, message.batch_size)
        if live is not None:
            live.advance(message, shaped(message, arrays))
            if message.step_seconds is not None:
                self._learn_cost(live.ticket.request.params, message.step_seconds)

    def _learn_cost(self, params: SamplingParams, seconds: float) -> None:
        """Remember the fastest step: the smaller one is, the more of it is no work of its tokens."""
        assert self.schema is not None
        took = seconds / step_cost(params, self.schema)
        known = self._stats.cost_seconds
        self._stats = replace(self._stats, cost_seconds=min(took, known) if known else took)

    def _take_output(self, message: OutputMade, arrays: Sequence[Media]) -> None:
        live = self._live.get(message.request_id)
        if live is None:
            return
        media, rates = shaped(message, arrays), message.rates
        waves = [media.pop() for _ in rates][::-1]
        sounds = [Sound(samples, rate) for samples, rate in zip(waves, rates, strict=True)]
        output = Output(media, message.seed, message.params, message.timings, message.warnings, sounds)
        live.outputs[message.output_index] = output
        if len(live.outputs) == live.ticket.progress.num_outputs:
            del self._live[message.request_id]
            live.ticket.finish([live.outputs[index] for index in sorted(live.outputs)])

    def _fail(self, request_id: str, error: SafelightError) -> None:
        live = self._live.pop(request_id, None)
        if live is not None:
            live.ticket.fail(error)

    def _fail_all(self, error: SafelightError) -> None:
        for request_id in list(self._live):
            self._fail(request_id, error)


def shaped(message: Progressed | OutputMade, arrays: Sequence[Media]) -> list[Media]:
    """Return the arrays of a message in their shapes."""
    described = zip(arrays, message.dtypes, message.shapes, strict=True)
    return [array.view(np.dtype(dtype)).reshape(shape) for array, dtype, shape in described]
