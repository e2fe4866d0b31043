"""A worker: the processes that share every request, how they are started, watched and ended. Imports no torch."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path

from safelight.errors import PortError, WorkerStartError
from safelight.runtime.host_memory import HostMemory, Kills
from safelight.runtime.messages import LoadFailed, Start, Stop
from safelight.runtime.processes import python_command, safe_environment
from safelight.runtime.settings import EngineSettings
from safelight.runtime.transport import ServerChannel
from safelight.runtime.unit_board import UnitBoard

logger = logging.getLogger(__name__)

WATCH_SECONDS = 0.1
STOP_SECONDS = 5.0
BEGIN_SECONDS = 30.0
"""For which a process that was started may say nothing: its first message comes before it imports anything large."""
GROUP_SILENCE = 1.5
"""Seconds of silence after which one of several ranks counts as stopped: the others wait for it."""
_SIGNALS = {number.value: number.name for number in signal.Signals}


ALLOCATOR, ALLOCATOR_BEFORE = "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"
"""By which torch's allocator is told how to work; whoever sets one keeps it."""


def worker_environment() -> dict[str, str]:
    """Return the environment of a worker: a safe path, and memory in blocks that can grow, which leave no holes."""
    known = safe_environment()
    if ALLOCATOR not in known and ALLOCATOR_BEFORE not in known:
        known[ALLOCATOR] = "expandable_segments:True"
    return known


@dataclass(eq=False)
class Rank:
    """One process of a worker, and the way to it."""

    process: asyncio.subprocess.Process
    channel: ServerChannel
    heard: float = field(default_factory=time.monotonic)
    has_begun: bool = False
    memory: HostMemory = field(default_factory=HostMemory)
    kills: Kills = field(init=False)

    def __post_init__(self) -> None:
        """Note what the kernel has killed until now."""
        self.kills = self.memory.kills()

    def was_heard(self) -> None:
        """Note that it has said something."""
        self.heard, self.has_begun = time.monotonic(), True

    async def end(self) -> str:
        """Wait until the process ends; say how."""
        code = await self.process.wait()
        if code >= 0:
            return f"exit code {code}"
        signal_name = _SIGNALS.get(-code, f"signal {-code}")
        by_kernel = self.memory.kills().since(self.kills) if code == -signal.SIGKILL else ""
        return f"killed by {signal_name}{by_kernel and f', {by_kernel}'}"

    async def hear(self) -> LoadFailed:
        """Hear that it runs, as a rank beside the first, until it says that it cannot load."""
        while True:
            message, _ = await self.channel.receive()
            self.was_heard()
            if isinstance(message, LoadFailed):
                return message


@dataclass(eq=False)
class WorkerGroup:
    """The processes that share every request; the first speaks for all."""

    ranks: list[Rank]
    board: UnitBoard
    store: Path | None = None
    ready: bool = False

    @property
    def process(self) -> asyncio.subprocess.Process:
        """The first one's process."""
        return self.ranks[0].process

    @property
    def channel(self) -> ServerChannel:
        """The way to the first one."""
        return self.ranks[0].channel

    async def watch(self, settings: EngineSettings) -> None:
        """Return when the worker takes too long for a unit, or is silent for too long."""
        looked = time.monotonic()
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            now = time.monotonic()
            held_up, looked = max(0.0, now - looked - 2 * WATCH_SECONDS), now
            for rank in self.ranks:  # while this process itself was held up, nobody could be heard
                rank.heard += held_up
            unit = self.board.read()
            if unit is not None and unit.is_late():
                logger.error("the worker takes more than %.0f s for a unit of %s", unit.limit, unit.kind)
                return
            for rank in self.ranks:
                silence = self._silence(rank, settings)
                if time.monotonic() > rank.heard + silence:
                    logger.error("the worker has been silent for %.1f s", silence)
                    return

    def _silence(self, rank: Rank, settings: EngineSettings) -> float:
        """Return the seconds for which a rank may be silent."""
        if self.ready:
            return min(settings.heartbeat_limit, GROUP_SILENCE if len(self.ranks) > 1 else math.inf)
        return settings.unit_limits.first if rank.has_begun else min(BEGIN_SECONDS, settings.unit_limits.first)

    async def stop(self, kindly: bool) -> None:
        """End the worker's processes: kindly, if they are to finish what they do, or at once."""
        if kindly and self.process.returncode is None:
            with contextlib.suppress(Exception):
                self.channel.send(Stop())
                await asyncio.wait_for(asyncio.gather(*(rank.process.wait() for rank in self.ranks)), STOP_SECONDS)
        for rank in self.ranks:
            if rank.process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    rank.process.send_signal(signal.SIGKILL)
        for rank in self.ranks:
            await rank.process.wait()
            rank.channel.close()
        if self.store is not None:
            self.store.unlink(missing_ok=True)


async def start_worker(folder: Path, number: int, settings: EngineSettings) -> WorkerGroup:
    """Start a worker's processes, and tell each what to load.

    Args:
        folder: of their sockets.
        number: of the worker, among all.
        settings: of the engine.

    Raises:
        WorkerStartError: if a process cannot be started.
        PortError: if a socket cannot be made.

    """
    num_ranks, board = settings.num_ranks, folder / f"{number}.unit"
    # The ranks of other machines are started there; this process has the first one's alone.
    local = 1 if settings.is_first_of_torchrun else num_ranks
    store = None if local < num_ranks or num_ranks == 1 else folder / f"{number}.store"
    try:
        worker = WorkerGroup([], UnitBoard(board), store)
    except OSError as error:
        raise PortError(f"TMPDIR: {str(folder)!r} cannot be written: {error.strerror or error}") from error
    try:
        for rank in range(local):
            start = Start(settings, rank, rank, None if store is None else store.name)
            worker.ranks.append(await start_rank(folder / f"{number}.{rank}.ipc", board, start))
    except BaseException:
        await worker.stop(kindly=False)
        worker.board.remove()
        raise
    return worker


async def start_rank(socket: Path, board: Path, start: Start) -> Rank:
    """Start one process."""
    channel = ServerChannel(socket)
    command = python_command("safelight.runtime.worker.process", str(socket), str(board), str(os.getpid()))
    # A session of its own: an interrupt at the terminal is the supervisor's, who decides when the worker ends.
    try:
        process = await asyncio.create_subprocess_exec(
            *command, stdin=asyncio.subprocess.DEVNULL, start_new_session=True, env=worker_environment()
        )
    except OSError as error:
        channel.close()
        reason = f"{command[0]!r}: {error.strerror or error}"
        raise WorkerStartError(f"the worker's process cannot be started: {reason}") from error
    except BaseException:
        channel.close()
        raise
    channel.send(start)
    return Rank(process, channel)
