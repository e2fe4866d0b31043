"""A whole server: engine, jobs and HTTP, from its start to its end. Imports no torch."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import time
from collections.abc import Callable, Iterator

import uvicorn

from safelight.core.server_args import ServerArgs
from safelight.errors import InvalidParameterError, PortError, SafelightError
from safelight.loading.elsewhere import existing
from safelight.parallel.torchrun import launched
from safelight.runtime.settings import EngineSettings
from safelight.runtime.supervisor.replicas import ReplicaSet
from safelight.runtime.unit_board import UnitLimits
from safelight.serving.addresses import read_address_key
from safelight.serving.app import create_app
from safelight.serving.context import Settings
from safelight.serving.http.listening import Listener, bound, raise_limit
from safelight.serving.http.protocol import uvicorn_config
from safelight.serving.http_args import HTTPArgs
from safelight.serving.jobs.folder import FolderFiles
from safelight.serving.jobs.limits import JobLimits
from safelight.serving.jobs.manager import JobManager
from safelight.serving.jobs.sqlite import SqliteJobStore
from safelight.serving.limits import Limits
from safelight.serving.principals import Keys

logger = logging.getLogger(__name__)

SHIPPED_MODEL_NAME = "safelight-shapes"
GAVE_UP = 70
"""What the process ends with when workers die again and again."""
SECOND_SIGNAL_SECONDS = 2.0
CLOSING_SECONDS = 2.0
"""That answers under way and outputs being written have, once nothing runs any more."""
POLL_SECONDS = 0.05


class _Uvicorn(uvicorn.Server):
    """Leaves the signals to us: a stop first lets running requests finish."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Server:
    """One server. `run` serves until a signal, or until the engine gives up.

    Args:
        server_args: of the engine.
        http_args: of HTTP, queue and storage.
        say: told, in a line each, what a person needs to know of the start and the end.

    """

    def __init__(self, server_args: ServerArgs, http_args: HTTPArgs, say: Callable[[str], None]) -> None:
        self.server_args, self.http_args, self.say = server_args, http_args, say
        self.model = served_names(server_args, http_args)[0]
        self._deadline: float | None = None
        self._told_compiled = False
        self._stopping = asyncio.Event()

    async def run(self) -> int:
        """Serve; return the exit code.

        Raises:
            SafelightError: if it cannot start.

        """
        keys = self.http_args.keys()
        with listen(self.http_args.host, self.http_args.port) as listener:
            listener.bound = bound(raise_limit())
            state = self.http_args.state_path()
            engine = ReplicaSet(engine_settings(self.server_args, self.http_args), self.http_args.replicas)
            engine.on_compiled = self._compiled
            jobs = JobManager(
                SqliteJobStore(state), FolderFiles(state / "outputs"), engine, limits=job_limits(self.http_args, keys)
            )
            settings = Settings(
                served_names(self.server_args, self.http_args),
                keys=keys,
                public_url=self.http_args.public_url,
                allowed_origins=self.http_args.origins(),
                allowed_hosts=self.http_args.hosts(),
                response_format=self.http_args.response_format,
                address_key=read_address_key(state),
                closing_seconds=CLOSING_SECONDS,
                limits=Limits(
                    waiting=self.http_args.max_waiting,
                    max_cost=self.http_args.max_cost,
                    max_tokens=self.http_args.max_tokens,
                    unit_seconds=self.http_args.first_unit_limit,
                ),
            )
            await jobs.start()  # what it refuses is told in a line, before anything listens
            config = uvicorn_config(create_app(engine, jobs, settings), settings.limits)
            config.timeout_graceful_shutdown = int(CLOSING_SECONDS)
            return await self._serve(_Uvicorn(config), listener, engine)

    async def _serve(self, server: uvicorn.Server, listener: socket.socket, engine: ReplicaSet) -> int:
        """Answer from the start, load the model, and serve until told to stop."""
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._signalled)
        http = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            self.say(f"loading {self.model}")
            begun = time.monotonic()
            if not await self._before_stop(engine.start(), http):
                return 0
            host = f"[{self.http_args.host}]" if ":" in self.http_args.host else self.http_args.host
            address = f"http://{host}:{listener.getsockname()[1]}"
            warm = ", warmed up with one small request" if engine.stats.warm_up_seconds else ""
            self.say(f"{self.model} is ready after {time.monotonic() - begun:.1f} s{warm}: {address}")
            if self.server_args.compile != "none" and not self._told_compiled:
                self.say("the model is being compiled in the background; until then requests run eagerly")
            await self._before_stop(engine.gave_up.wait(), http)
            if engine.gave_up.is_set():
                self.say("the engine's workers died again and again; the log says more")
                return GAVE_UP
            self.say("stopping: requests that run may finish")
            await self._drain(engine)
            return 0
        finally:
            server.should_exit = True
            await asyncio.gather(http, return_exceptions=True)
            await engine.close()

    def _compiled(self, reason: str) -> None:
        """Tell what became of compiling, of the first worker; a later one finds everything in the cache."""
        if not self._told_compiled:
            self._told_compiled = True
            self.say(f"the model is not compiled, and runs eagerly: {reason}" if reason else "the model is compiled")

    async def _before_stop(self, work: object, http: asyncio.Task[None]) -> bool:
        """Wait for work, a stop, or the end of HTTP; say whether the work is done."""
        task = asyncio.ensure_future(work)  # type: ignore[call-overload]
        stop = asyncio.create_task(self._stopping.wait())
        try:
            await asyncio.wait({task, stop, http}, return_when=asyncio.FIRST_COMPLETED)
            if http.done():
                http.result()
                raise SafelightError("the HTTP server ended by itself; the log says more")
            if task.done():
                task.result()
            return bool(task.done())
        finally:
            for each in (task, stop):
                each.cancel()
            await asyncio.gather(task, stop, return_exceptions=True)

    async def _drain(self, engine: ReplicaSet) -> None:
        """Take nothing new, and let what runs finish, until the deadline."""
        engine.drain()
        while engine.stats.num_running + engine.stats.num_waiting:
            if self._deadline is not None and time.monotonic() > self._deadline:
                return
            await asyncio.sleep(POLL_SECONDS)

    def _signalled(self) -> None:
        """Stop: the first time kindly, the second time soon."""
        seconds = SECOND_SIGNAL_SECONDS if self._stopping.is_set() else self.http_args.drain_seconds
        self._deadline = time.monotonic() + seconds
        self._stopping.set()


@contextlib.contextmanager
def listen(host: str, port: int) -> Iterator[Listener]:
    """Return a socket that is bound, and nothing else than what was asked for.

    Raises:
        PortError: if the port or the host cannot be had.

    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = Listener(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise PortError(f"port: {host}:{port} cannot be listened on: {error.strerror or error}") from error
    with listener:
        yield listener


def served_names(server_args: ServerArgs, http_args: HTTPArgs) -> tuple[str, ...]:
    """Return the names under which the model is asked for; the first is the one that answers name."""
    if http_args.served_model_name is not None:
        return tuple(name.strip() for name in http_args.served_model_name.split(",") if name.strip())
    if server_args.model is None:
        return (SHIPPED_MODEL_NAME,)
    path = existing(server_args.model)
    return (server_args.model.partition("@")[0] if path is None else path.resolve().name,)


def engine_settings(server_args: ServerArgs, http_args: HTTPArgs) -> EngineSettings:
    """Return what each replica's supervisor needs to know.

    Raises:
        InvalidParameterError: for replicas of a model whose ranks `torchrun` has started.

    """
    place = launched(server_args.num_devices())
    if place is not None and http_args.replicas > 1:
        raise InvalidParameterError("replicas", http_args.replicas, "1 under torchrun, which starts one model's ranks")
    return EngineSettings(
        server_args=server_args,
        model_name=served_names(server_args, http_args)[0],
        max_running=http_args.max_running,
        max_waiting=http_args.max_waiting,
        batching=http_args.batching,
        share=http_args.share,
        warm_up=http_args.warm_up,
        unit_limits=UnitLimits(least=http_args.unit_limit, first=http_args.first_unit_limit),
        heartbeat_limit=http_args.heartbeat_limit,
        is_first_of_torchrun=place is not None,
    )


def job_limits(http_args: HTTPArgs, keys: Keys) -> JobLimits:
    """Return what bounds jobs."""
    return JobLimits(
        keep_seconds=3600 * http_args.keep_hours,
        max_bytes=http_args.max_storage,
        # A further replica is given what it can run; what waits before all of them does not grow.
        max_submitted=JobLimits.max_submitted + http_args.max_running * (http_args.replicas - 1),
        tenants=keys.tenants(),
    )
