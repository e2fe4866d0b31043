"""A whole server in this process, and a trace of the way that one value takes through it."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import os
import sys
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, NamedTuple

import httpx
import msgspec
import numpy as np
import pytest
from PIL import Image

from safelight import ServerArgs
from safelight.encoded import EncodedImage
from safelight.runtime.messages import Start
from safelight.runtime.settings import EngineSettings
from safelight.runtime.supervisor import supervisor
from safelight.runtime.supervisor.group import Rank, WorkerGroup
from safelight.runtime.supervisor.replicas import ReplicaSet
from safelight.runtime.transport import ServerChannel, WorkerChannel
from safelight.runtime.unit_board import UnitBoard
from safelight.runtime.worker.gpu_worker import GPUWorker
from safelight.runtime.worker.scheduler import Scheduler
from safelight.serving.app import create_app
from safelight.serving.context import Settings
from safelight.serving.http import bodies
from safelight.serving.jobs.folder import FolderFiles
from safelight.serving.jobs.manager import JobManager
from safelight.serving.jobs.sqlite import SqliteJobStore

SOURCE = str(Path(supervisor.__file__).parents[2]) + os.sep
DATA = (
    *("Body", "Asked", "Resolved", "Upload", "Repeated", "Stored", "LongText", "Spool"),
    *("LiveRequest", "Ticket", "Task", "Execution", "Req"),
)
"""Classes of ours beside dataclasses and messages whose objects are data, and not somebody who works on it."""
SERVICES = ("EngineSettings", "WorkerGroup", "Rank", "ModelSchema", "ServerArgs", "Settings", "Limits")
_DEPTH = 9


class ThreadProcess:
    """A worker's thread, as the supervisor sees a process."""

    pid, returncode = os.getpid(), None

    def __init__(self, run: Callable[[], int]) -> None:
        self._thread = threading.Thread(target=self._end, args=(run,), name="worker")
        self._thread.start()

    def _end(self, run: Callable[[], int]) -> None:
        sys.setprofile(None)  # until the model is loaded
        self.returncode = run()

    async def wait(self) -> int:
        await asyncio.to_thread(self._thread.join)
        return self.returncode or 0

    def send_signal(self, number: int) -> None:
        """A thread cannot be killed: it ends by itself, when it is told to stop."""


async def start_thread(folder: Path, number: int, settings: EngineSettings) -> WorkerGroup:
    """Start a worker as `runtime.supervisor.group` does, with a thread in the place of the process."""
    board, path = folder / f"{number}.unit", folder / f"{number}.ipc"
    group, channel = WorkerGroup([], UnitBoard(board)), ServerChannel(path)
    channel.send(Start(settings))
    worker = GPUWorker(WorkerChannel(str(path), os.getppid()), str(board))
    group.ranks.append(Rank(ThreadProcess(worker.run), channel))  # type: ignore[arg-type]
    return group


async def answers(
    model: Path, folder: Path, send: Callable[[httpx.AsyncClient], Awaitable[httpx.Response]]
) -> httpx.Response:
    """Serve a model, with everything but processes, and return the answer to one request."""
    engine = ReplicaSet(EngineSettings(ServerArgs(str(model), device="cpu"), warm_up=False), 1)
    jobs = JobManager(SqliteJobStore(folder / "state"), FolderFiles(folder / "outputs"), engine)
    app = create_app(engine, jobs, Settings(("tiny",)))
    await jobs.start()
    try:
        await engine.start()
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://localhost", timeout=60
        ) as http:
            return await send(http)
    finally:
        await engine.close()
        await jobs.close(0)
        gc.unfreeze()  # what the worker froze


@dataclasses.dataclass
class Returned:
    """A call of a function of ours that gave the value back."""

    code: CodeType
    parent: CodeType | None
    result: Any
    names: set[str]


class Walk:
    """Follows a value through the functions of ours, from the route to where it is used.

    Args:
        holds: whether a plain value is the one that is followed, or has it in it.
        stations: the functions by which the value is handed over: to another thread, task, process or tick.
        end: whether a frame that begins is the place where it is used.

    """

    def __init__(
        self, holds: Callable[[Any], bool], stations: tuple[str, ...], end: Callable[[FrameType], bool]
    ) -> None:
        self._holds, self._stations, self._end = holds, stations, end
        self._returned: list[Returned] = []
        self._lock = threading.Lock()
        self.stacks: dict[str, list[FrameCopy]] = {}
        self.is_over = False

    @contextlib.contextmanager
    def traced(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        """Trace every thread that is started now, and the scheduler's from its first tick on."""
        run = Scheduler.run

        def traced_run(scheduler: Scheduler) -> None:
            sys.setprofile(self._event)
            run(scheduler)

        monkeypatch.setattr(Scheduler, "run", traced_run)
        for name in ("_LARGE_BODIES", "_BODIES"):  # whose threads an earlier test may have started
            monkeypatch.setattr(bodies, name, ThreadPoolExecutor(1))
        threading.setprofile(self._event)
        sys.setprofile(self._event)
        try:
            yield
        finally:
            sys.setprofile(None)
            threading.setprofile(None)

    def _event(self, frame: FrameType, kind: str, arg: Any) -> None:
        code = frame.f_code
        if self.is_over or kind not in ("call", "return", "c_call"):
            return
        if kind == "c_call" and code.co_qualname not in self._stations:
            return
        if kind == "call" and self._end(frame):
            self.stacks["end"] = self._stack(frame)
            self.is_over = True
        elif not code.co_filename.startswith(SOURCE) or code.co_name.startswith("<"):
            return
        elif code.co_qualname in self._stations and code.co_qualname not in self.stacks:
            if any(self.has(value) for value in frame.f_locals.values()):
                self.stacks[code.co_qualname] = self._stack(frame)
        elif kind == "return" and arg is not None and self.has(arg):
            with self._lock:
                self._returned.append(Returned(code, _caller(frame), arg, self._names(frame)))

    def _stack(self, frame: FrameType | None) -> list[FrameCopy]:
        """Return the frames of ours from the first that has the value, or from the route, to this one."""
        frames = []
        while frame is not None:
            if frame.f_code.co_filename.startswith(SOURCE) and not frame.f_code.co_name.startswith("<"):
                has = any(self.has(value) for value in frame.f_locals.values())
                frames.append(FrameCopy(frame.f_code, has, self._names(frame)))
                if "routes.<locals>" in frame.f_code.co_qualname:
                    break
            frame = frame.f_back
        else:
            while frames and not frames[-1].has_it:
                frames.pop()
        return frames[::-1]

    def _names(self, frame: FrameType) -> set[str]:
        """Return the names under which a function is given the value itself."""
        code = frame.f_code
        given = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        return {name for name in given if name != "self" and self._is_it(frame.f_locals.get(name))}

    def _is_it(self, value: Any) -> bool:
        entries = list(value) if isinstance(value, list | tuple) else [value]
        return any(self._holds(plain(entry)) for entry in entries)

    def has(self, value: Any, depth: int = _DEPTH) -> bool:
        """Say whether the value is in this one: in what is data, to some depth, and not in who works on it."""
        if depth == 0 or value is None:
            return False
        kept = plain(value)
        if isinstance(kept, str | bytes | bytearray | memoryview | BaseException):
            return self._holds(kept)
        if isinstance(value, Mapping):
            return any(self.has(entry, depth - 1) for entry in value.values())
        if isinstance(value, list | tuple | deque | set | frozenset):
            return any(self.has(entry, depth - 1) for entry in value)
        name = type(value).__name__
        if name in SERVICES or not type(value).__module__.startswith("safelight."):
            return False
        if isinstance(value, msgspec.Struct):
            return any(self.has(getattr(value, each), depth - 1) for each in value.__struct_fields__)
        if dataclasses.is_dataclass(value):
            return any(self.has(getattr(value, each.name, None), depth - 1) for each in dataclasses.fields(value))
        return name in DATA and any(self.has(entry, depth - 1) for entry in vars(value).values())

    def way(self) -> list[CodeType]:
        """Return the functions by whose calls the value goes on, in the order in which they are first met."""
        return list(dict.fromkeys(copy.code for stack in self.stacks.values() for copy in stack))

    def givers(self) -> list[CodeType]:
        """Return the functions that those on the way call, and are given the value by, in one form or another.

        And, where such a function only passes on what another one gave it, that one.
        """
        way = self.way()
        found = [each for each in self._returned if each.parent in way and each.code not in way]
        while inner := [
            each
            for each in self._returned
            if all(each is not other for other in found)
            and each.code not in way
            and any(each.result is other.result for other in found)
        ]:
            found += inner
        return list(dict.fromkeys(each.code for each in found))

    def names(self) -> set[str]:
        """Return the names that the value has as an argument, in singular."""
        named = [copy.names for stack in self.stacks.values() for copy in stack]
        named += [each.names for each in self._returned if each.code in self.givers()]
        return {name.removesuffix("s") for names in named for name in names}

    def counts(self) -> Counts:
        way, givers = self.way(), self.givers()
        return Counts(len(way), len(files(way)), len(way + givers), len(files(way + givers)), len(self.names()))

    def report(self) -> str:
        lines = [str(self.counts()), f"names: {', '.join(sorted(self.names()))}"]
        for title, codes in (("the way", self.way()), ("given by", self.givers())):
            lines += [
                f"{title}:",
                *(f"  {code.co_filename.removeprefix(SOURCE)}: {code.co_qualname}" for code in codes),
            ]
        return "\n".join(lines)


class Counts(NamedTuple):
    """How long a walk is: functions and files of the way alone, and with those that give the value; names of it."""

    way: int
    way_files: int
    whole: int
    whole_files: int
    names: int


def files(codes: list[CodeType]) -> set[str]:
    """Return the files that functions are in."""
    return {code.co_filename for code in codes}


@dataclasses.dataclass
class FrameCopy:
    """What is kept of a frame."""

    code: CodeType
    has_it: bool
    names: set[str]


def plain(value: Any) -> Any:
    """Return the bytes of what is a file or an array."""
    if isinstance(value, EncodedImage):
        return value.file
    if isinstance(value, Image.Image):
        return value.tobytes()
    return value.tobytes() if isinstance(value, np.ndarray) else value


def _caller(frame: FrameType) -> CodeType | None:
    """Return the function of ours that called this one."""
    found = frame.f_back
    while found is not None:
        if found.f_code.co_filename.startswith(SOURCE) and not found.f_code.co_name.startswith("<"):
            return found.f_code
        found = found.f_back
    return None
