"""The real server in a thread, on a stub engine, for tests over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import httpx
import pytest
import uvicorn
from openai import OpenAI

from safelight.core.schema import ModelSchema
from safelight.serving import videos_api
from safelight.serving.app import create_app
from safelight.serving.context import Settings
from safelight.serving.http.protocol import uvicorn_config
from safelight.serving.jobs.folder import FolderFiles
from safelight.serving.jobs.limits import JobLimits
from safelight.serving.jobs.manager import JobManager
from safelight.serving.jobs.sqlite import SqliteJobStore
from safelight.serving.limits import Limits
from safelight.serving.principals import Keys, one_key
from tests.serving.stub_engine import IMAGE_SCHEMA, StubEngine

T = TypeVar("T")
NAMES = ("org/tiny", "tiny")
INSIDE = re.compile(r"Traceback|safelight\.|site-packages|0x[0-9a-f]{6}|/models/|/work|/tmp|\.py\b|object at|PIL")
"""What no message may hold."""
PROMPT = "a red circle"


@dataclass
class Running:
    """A server that answers, and what a test does with it."""

    engine: StubEngine
    port: int
    loop: asyncio.AbstractEventLoop
    settings: Settings
    server: uvicorn.Server
    jobs: JobManager
    key: str | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.key}"} if self.key else {}

    def http(self, **more: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, headers=self.headers, timeout=30, **more)

    def openai(self, **more: Any) -> OpenAI:
        more = {"max_retries": 0, **more}
        return OpenAI(base_url=f"{self.url}/v1", api_key=self.key or "none", timeout=30, **more)

    def call(self, function: Callable[[], T]) -> T:
        """Run a function in the event loop's thread, where the engine may be touched."""

        async def run() -> T:
            return function()

        return asyncio.run_coroutine_threadsafe(run(), self.loop).result(10)

    def until(self, condition: Callable[[], bool], seconds: float = 60.0) -> None:
        end = time.monotonic() + seconds
        while not self.call(condition):
            assert time.monotonic() < end, "it did not come"
            time.sleep(0.005)

    def num_connections(self) -> int:
        return len(self.server.server_state.connections)

    def connect(self, data: bytes = b"") -> socket.socket:
        sock = socket.create_connection(("127.0.0.1", self.port), timeout=30)
        sock.sendall(data)
        return sock

    def raw(self, data: bytes) -> tuple[int, dict[str, str], Any]:
        """Send bytes as they are, and return status, headers and JSON of the one answer."""
        with self.connect(data) as sock:
            return read_answer(sock)


def read_answer(sock: socket.socket) -> tuple[int, dict[str, str], Any]:
    """Read the one answer that is on its way; status 0 where the connection ends without one."""
    with sock.makefile("rb") as file:
        return next_answer(file)


def next_answer(file: BinaryIO) -> tuple[int, dict[str, str], Any]:
    """Read one answer with a Content-Length; others may follow."""
    line = file.readline()
    if not line:
        return 0, {}, None
    headers = {}
    while header := file.readline().decode().strip():
        name, _, value = header.partition(":")
        headers[name.lower()] = value.strip()
    body = file.read(int(headers.get("content-length", 0)))
    return int(line.split()[1]), headers, json.loads(body) if body else None


@contextlib.contextmanager
def running(
    folder: Path,
    schema: ModelSchema = IMAGE_SCHEMA,
    key: str | None = None,
    keys: Keys | None = None,
    limits: Limits | None = None,
    more: Mapping[str, Any] | None = None,
    job_limits: JobLimits | None = None,
    **stub: Any,
) -> Iterator[Running]:
    """Run a server until the block ends; `more` are further settings, `stub` is for the engine."""
    settings = Settings(NAMES, keys or one_key(key), closing_seconds=1.0, limits=limits or Limits(), **(more or {}))
    schema = dataclasses.replace(schema, model=NAMES[0])
    engine = StubEngine(schema, **stub)
    jobs = JobManager(SqliteJobStore(folder / "state"), FolderFiles(folder / "outputs"), engine, limits=job_limits)
    server = uvicorn.Server(uvicorn_config(create_app(engine, jobs, settings), settings.limits))
    loops: list[asyncio.AbstractEventLoop] = []

    async def serve() -> None:
        loops.append(asyncio.get_running_loop())
        await server.serve()
        await engine.aclose()

    thread = threading.Thread(target=lambda: asyncio.run(serve()), name="server")
    thread.start()
    try:
        end = time.monotonic() + 20
        while not server.started:
            assert thread.is_alive() and time.monotonic() < end, "the server did not start"
            time.sleep(0.005)
        port = server.servers[0].sockets[0].getsockname()[1]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(videos_api, "POLL_AFTER_MS", 20)
            yield Running(engine, port, loops[0], settings, server, jobs, key)
    finally:
        if loops:
            loops[0].call_soon_threadsafe(engine.release)
        server.should_exit = True
        server.force_exit = False
        thread.join(20)
        assert not thread.is_alive(), "the server did not stop"


def assert_error(response: httpx.Response, status: int, param: str | None = None) -> dict[str, Any]:
    """Hold an error to the API's form, and to saying nothing of the inside."""
    assert response.status_code == status, response.text[:2000]
    assert response.headers["x-request-id"].startswith("req_")
    assert response.headers.get("content-type") == "application/json"
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param, error
    assert all(isinstance(error[name], str) and error[name] for name in ("message", "type", "code"))
    assert not INSIDE.search(error["message"]), error
    if status >= 500:
        assert response.headers["x-should-retry"] == ("true" if error["code"] == "not_ready" else "false")
    return error
