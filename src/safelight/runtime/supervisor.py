"""The supervisor: starts the worker, hands it requests, watches it, and starts it again. Imports no torch."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import msgspec

from safelight.core.schema import ModelSchema
from safelight.core.server_args import ServerArgs
from safelight.errors import (
    CancelledError,
    ModelError,
    NotReadyError,
    QueueFullError,
    SafelightError,
    UsageError,
    WorkerLostError,
    by_code,
)
from safelight.runtime.client import (
    EngineClient,
    EngineStats,
    GenerationRequest,
    Media,
    Output,
    State,
    Ticket,
)
from safelight.runtime.cost import request_cost
from safelight.runtime.live import LiveRequest
from safelight.runtime.messages import (
    Array,
    Cancel,
    Compiled,
    Failed,
    FromWorker,
    Heartbeat,
    Loaded,
    LoadFailed,
    OutputMade,
    Progressed,
    Start,
    Stop,
    ToWorker,
    schema_from_wire,
)
from safelight.runtime.transport import Parcel, ServerChannel
from safelight.runtime.watch import UnitBoard, UnitLimits

logger = logging.getLogger(__name__)

WATCH_SECONDS = 0.1
STOP_SECONDS = 5.0
GROUP_SILENCE = 1.5
"""Seconds of silence after which one of several ranks counts as stopped: the others wait for it."""
MAX_DEATHS = 3
DEATHS_WINDOW = 300.0


@dataclass(frozen=True)
class EngineSettings:
    """What a supervisor needs to know.

    Attributes:
        server_args: the engine's settings.
        model_name: what the model is called in schema and files; None leaves it the name that it was loaded by.
        max_running: outputs that hold device memory at most.
        max_waiting: requests that may wait.
        batching: `exact` or `throughput`.
        share: of device time for the oldest request.
        warm_up: whether the worker runs one small request before it is ready.
        unit_limits: how long units of work may take.
        heartbeat_limit: seconds of silence after which a worker counts as stopped.
        is_first_of_torchrun: whether `torchrun` starts the other ranks, on this machine and on others.
        first_device: of the GPUs, counted from the one that `server_args` names.

    """

    server_args: ServerArgs = field(default_factory=ServerArgs)
    model_name: str | None = None
    max_running: int = 4
    max_waiting: int = 64
    batching: str = "exact"
    share: float = 0.1
    warm_up: bool = True
    unit_limits: UnitLimits = field(default_factory=UnitLimits)
    heartbeat_limit: float = 10.0
    is_first_of_torchrun: bool = False
    first_device: int = 0


@dataclass(eq=False)
class _Rank:
    """One process of a worker, and the way to it."""

    process: asyncio.subprocess.Process
    channel: ServerChannel
    start: Start
    heard: float = field(default_factory=time.monotonic)


@dataclass(eq=False)
class _Worker:
    """The processes that share every request; the first speaks for all."""

    ranks: list[_Rank]
    board: UnitBoard
    outgoing: asyncio.Queue[Parcel] = field(default_factory=asyncio.Queue)
    ready: bool = False

    @property
    def process(self) -> asyncio.subprocess.Process:
        """The first one's process."""
        return self.ranks[0].process

    @property
    def channel(self) -> ServerChannel:
        """The way to the first one."""
        return self.ranks[0].channel


class Supervisor(EngineClient):
    """One worker, kept alive. Every request that was taken ends in one answer, through the worker's death as well.

    Args:
        settings: of the engine.

    Attributes:
        gave_up: whether workers have died too often.
        on_compiled: told, for each worker, that the model is compiled, by an empty string; or why it is not.
        on_lost: told that a worker is lost, once those requests are answered that it was lost with: who listens may
            withdraw the others. Without it they wait for the next worker.

    """

    def __init__(self, settings: EngineSettings) -> None:
        self.settings = settings
        self.gave_up = asyncio.Event()
        self.on_compiled: Callable[[str], None] | None = None
        self.on_lost: Callable[[Supervisor], None] | None = None
        self._schema: ModelSchema | None = None
        self._state: State = "loading"
        self._stats = EngineStats()
        self._live: dict[str, LiveRequest] = {}
        self._worker: _Worker | None = None
        self._deaths: deque[float] = deque(maxlen=MAX_DEATHS)
        self._ready: asyncio.Future[None] | None = None
        self._task: asyncio.Task[None] | None = None
        self._folder = Path()
        self._closing = False

    @property
    def schema(self) -> ModelSchema | None:
        """What the model takes; None until it has been loaded once."""
        return self._schema

    @property
    def state(self) -> State:
        """Whether it works."""
        return self._state

    @property
    def stats(self) -> EngineStats:
        """Figures for metrics."""
        waiting = self._num_waiting()
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
        self._folder = Path(tempfile.mkdtemp(prefix="safelight-"))  # of mode 0700
        self._ready = asyncio.get_running_loop().create_future()
        self._task = asyncio.create_task(self._keep_alive())
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
            shutil.rmtree(self._folder, ignore_errors=True)  # there is one only if it was started
        self._fail_all(NotReadyError("the server stopped before the request was done"))

    def drain(self) -> None:
        """Take no more requests; those that were taken go on."""
        if self._state != "failed":
            self._state = "draining"

    def submit(self, request: GenerationRequest) -> Ticket:
        """Put a request into the queue. It ends in exactly one answer, through a worker's death as well.

        Raises:
            QueueFullError: if as many wait as may.
            NotReadyError: if the model is not loaded, or the server stops.

        """
        if self._state not in ("ready", "restarting"):
            raise NotReadyError(f"the model is not ready ({self._state})")
        if self._num_waiting() >= self.settings.max_waiting:
            raise QueueFullError(f"{self.settings.max_waiting} requests wait already; try again later")
        assert request.request_id not in self._live, "two requests have one id"
        assert self._schema is not None, "it has been loaded once"
        cost = request_cost(request.params, self._schema)
        live = LiveRequest(Ticket(request), time.monotonic(), cost, request.mode)
        self.adopt(live)
        return live.ticket

    def adopt(self, live: LiveRequest) -> None:
        """Take a request that was taken before, whatever waits here: it has its ticket."""
        self._live[live.ticket.request.request_id] = live
        self._send(*live.parcel())

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
            self._send(Cancel(request_id))
            live.ticket.fail(CancelledError("the request was cancelled"))

    # The worker's life

    async def _keep_alive(self) -> None:
        """Run one worker after another, until too many have died."""
        while not self.gave_up.is_set():
            worker = await self._spawn()
            self._worker = worker
            try:
                reason = await self._serve(worker)
                if self._state == "ready":
                    self._state = "restarting"
            finally:
                self._worker = None
                await self._reap(worker)
            self._mourn(worker, reason)
            worker.board.remove()

    async def _spawn(self) -> _Worker:
        number, num_ranks = self._stats.num_restarts, self.settings.server_args.num_devices()
        board = self._folder / f"{number}.unit"
        # The ranks of other machines are started there; this process has the first one's alone.
        local = 1 if self.settings.is_first_of_torchrun else num_ranks
        first = Start(
            server_args=asdict(self.settings.server_args),
            max_running=self.settings.max_running,
            batching=self.settings.batching,
            share=self.settings.share,
            limits=self.settings.unit_limits,
            warm_up=self.settings.warm_up,
            num_ranks=num_ranks,
            first_device=self.settings.first_device,
            store=None if local < num_ranks else f"{number}.store",
        )
        starts = [msgspec.structs.replace(first, rank=rank) for rank in range(local)]
        ranks = [await self._start_rank(self._folder / f"{number}.{start.rank}.ipc", board, start) for start in starts]
        worker = _Worker(ranks, UnitBoard(board))
        worker.outgoing.put_nowait((first, ()))
        return worker

    async def _start_rank(self, socket: Path, board: Path, start: Start) -> _Rank:
        channel = ServerChannel(socket)
        command = [sys.executable, "-m", "safelight.runtime.worker", str(socket), str(board), str(os.getpid())]
        # A session of its own: an interrupt at the terminal is the supervisor's, who decides when the worker ends.
        process = await asyncio.create_subprocess_exec(
            *command, stdin=asyncio.subprocess.DEVNULL, start_new_session=True
        )
        return _Rank(process, channel, start)

    async def _serve(self, worker: _Worker) -> str:
        """Exchange messages until the worker dies, hangs or gives up; return which."""
        parts: dict[asyncio.Task[object], str] = {
            asyncio.create_task(self._send_all(worker)): "cannot be reached",
            asyncio.create_task(self._receive_all(worker)): "gave up",
            asyncio.create_task(self._watch(worker)): "hung",
        }
        for rank in worker.ranks:
            parts[asyncio.create_task(rank.process.wait())] = "died"
        for rank in worker.ranks[1:]:
            parts[asyncio.create_task(self._hear(rank))] = "gave up"
        try:
            done, _ = await asyncio.wait(parts, return_when=asyncio.FIRST_COMPLETED)
            part = next(iter(done))
            if part.exception() is not None:  # the worker's boundary: what it sends must not end the supervisor
                logger.error("a message of the worker's cannot be understood", exc_info=part.exception())
                return "sent nonsense"
            return parts[part]
        finally:
            for part in parts:
                part.cancel()
            await asyncio.gather(*parts, return_exceptions=True)

    async def _hear(self, rank: _Rank) -> None:
        """Tell a rank beside the first to start, and hear that it runs, until it says that it cannot load."""
        await rank.channel.send(rank.start)
        while True:
            message, _ = await rank.channel.receive()
            rank.heard = time.monotonic()
            if isinstance(message, LoadFailed):
                self._load_failed(message)
                return

    async def _send_all(self, worker: _Worker) -> None:
        while True:
            message, arrays = await worker.outgoing.get()
            await worker.channel.send(message, arrays)

    async def _receive_all(self, worker: _Worker) -> None:
        """Take messages until the worker says that it cannot load."""
        while True:
            message, arrays = await worker.channel.receive()
            worker.ranks[0].heard = time.monotonic()
            if isinstance(message, LoadFailed):
                self._load_failed(message)
                return
            try:
                self._take(message, arrays)
            except Exception:  # a request's boundary: what is said of one ends that one
                if not isinstance(message, Progressed | OutputMade | Failed):
                    raise
                logger.exception("a message about request %s cannot be understood", message.request_id)
                self._send(Cancel(message.request_id))
                self._fail(message.request_id, SafelightError("the request's result cannot be understood"))

    async def _watch(self, worker: _Worker) -> None:
        """Return when the worker takes too long for a unit, or is silent for too long."""
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            unit = worker.board.read()
            if unit is not None and unit.is_late():
                logger.error("the worker takes more than %.0f s for a unit of %s", unit.limit, unit.kind)
                return
            silence = self.settings.unit_limits.first
            if worker.ready:
                silence = min(self.settings.heartbeat_limit, GROUP_SILENCE if len(worker.ranks) > 1 else math.inf)
            if time.monotonic() > min(rank.heard for rank in worker.ranks) + silence:
                logger.error("the worker has been silent for %.1f s", silence)
                return

    async def _reap(self, worker: _Worker) -> None:
        """End the worker's processes: kindly if it is idle and we stop, else at once."""
        if self._closing and worker.process.returncode is None:
            with contextlib.suppress(Exception):
                await asyncio.wait_for(worker.channel.send(Stop()), 1)
                await asyncio.wait_for(asyncio.gather(*(rank.process.wait() for rank in worker.ranks)), STOP_SECONDS)
        for rank in worker.ranks:
            if rank.process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    rank.process.send_signal(signal.SIGKILL)
        for rank in worker.ranks:
            await rank.process.wait()
            rank.channel.close()
        for store in self._folder.glob("*.store"):
            store.unlink()

    def _mourn(self, worker: _Worker, reason: str) -> None:
        """Answer the request whose unit ran; let all others wait for the next worker."""
        unit = worker.board.read()
        culprits = set(unit.requests) if unit is not None else set()
        logger.error("the worker %s (exit code %s)", reason, worker.process.returncode)
        if self._ready is not None and not self._ready.done():
            self._give_up()
            self._ready.set_exception(ModelError("the worker died while it loaded the model; the log says more"))
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
            self._state = "failed"
        elif self._state != "draining":
            self._state = "restarting"
        if self.on_lost is not None:
            self.on_lost(self)
        if is_last:
            logger.error("%d workers died within %.0f s", MAX_DEATHS, DEATHS_WINDOW)
            self._give_up()
        else:
            self._stats = replace(self._stats, num_restarts=self._stats.num_restarts + 1)

    def _give_up(self) -> None:
        self._state = "failed"
        self._fail_all(WorkerLostError("the worker died too often"))
        self.gave_up.set()

    def _load_failed(self, message: LoadFailed) -> None:
        if self._ready is not None and not self._ready.done():
            error = UsageError if message.exit_code == UsageError.exit_code else ModelError
            self._give_up()
            self._ready.set_exception(error.rebuilt(message.message))
        else:
            logger.error("the worker cannot load the model again: %s", message.message)

    # Messages

    def _take(self, message: FromWorker, arrays: Sequence[Media]) -> None:
        if isinstance(message, Heartbeat):
            self._take_heartbeat(message)
        elif isinstance(message, Loaded):
            self._take_loaded(message)
        elif isinstance(message, Compiled):
            self._take_compiled(message)
        elif isinstance(message, Progressed):
            self._take_progress(message)
        elif isinstance(message, OutputMade):
            self._take_output(message, arrays)
        elif isinstance(message, Failed):
            self._fail(message.request_id, by_code(message.code).rebuilt(message.message, message.param))

    def _take_loaded(self, message: Loaded) -> None:
        schema = schema_from_wire(message.schema)
        self._schema = replace(schema, model=self.settings.model_name or schema.model)
        self._stats = replace(self._stats, load_seconds=message.load_seconds)
        if self._worker is not None:
            self._worker.ready = True
        if self._state != "draining":
            self._state = "ready"
        for live in self._live.values():
            self._send(*live.parcel())
        if self._ready is not None and not self._ready.done():
            self._ready.set_result(None)

    def _take_compiled(self, message: Compiled) -> None:
        self._stats = replace(self._stats, compiled=not message.reason)
        if message.reason:
            logger.warning("the model is not compiled: %s", message.reason)
        if self.on_compiled is not None:
            self.on_compiled(message.reason)

    def _take_heartbeat(self, message: Heartbeat) -> None:
        self._stats = replace(self._stats, device_memory_bytes=message.device_memory_bytes)
        for request_id, position in message.positions.items():
            live = self._live.get(request_id)
            if live is None or live.ticket.progress.state != "queued":
                continue
            if live.ticket.progress.queue_position != position:
                live.ticket.advance(replace(live.ticket.progress, queue_position=position))

    def _take_progress(self, message: Progressed) -> None:
        live = self._live.get(message.request_id)
        if message.step_seconds is not None and self.on_step is not None:
            self.on_step(message.step_seconds, message.batch_size)
        if live is not None:
            live.advance(message)

    def _take_output(self, message: OutputMade, arrays: Sequence[Media]) -> None:
        live = self._live.get(message.request_id)
        if live is None:
            return
        media = [array.reshape(shape) for array, shape in zip(arrays, message.shapes, strict=True)]
        output = Output(media, message.seed, message.params, message.timings, message.warnings)
        live.outputs[message.output_index] = output
        if len(live.outputs) == live.ticket.progress.num_outputs:
            del self._live[message.request_id]
            live.ticket.finish([live.outputs[index] for index in sorted(live.outputs)])

    def _send(self, message: ToWorker, arrays: Sequence[Array] = ()) -> None:
        """Queue a message for the worker that is ready; without one, the next is sent every live request."""
        if self._worker is not None and self._worker.ready:
            self._worker.outgoing.put_nowait((message, arrays))

    def _fail(self, request_id: str, error: SafelightError) -> None:
        live = self._live.pop(request_id, None)
        if live is not None:
            live.ticket.fail(error)

    def _fail_all(self, error: SafelightError) -> None:
        for request_id in list(self._live):
            self._fail(request_id, error)

    def _num_waiting(self) -> int:
        return sum(live.ticket.progress.state == "queued" for live in self._live.values())
