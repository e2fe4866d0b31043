"""`safelight serve` as its users run it: a process of its own, with its worker, on a real port."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx

FAULT = Path(__file__).parent / "fault"
START_SECONDS = 90.0


def free_port() -> int:
    """Return a port that nothing listens on now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def fault_model(
    folder: Path, pipeline_name: str = "FaultPipeline", step_seconds: float = 0.0, decode_seconds: float = 0.0
) -> Path:
    """Write a model that fails on demand."""
    folder.mkdir(parents=True)
    index: dict[str, Any] = {"_class_name": pipeline_name, "_diffusers_version": "0.42.1"}
    index |= {"step_seconds": step_seconds, "decode_seconds": decode_seconds}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def command(*arguments: str) -> list[str]:
    """Return a command line of ours."""
    return [sys.executable, "-P", "-m", "safelight.cli.main", *arguments]


def environment() -> dict[str, str]:
    """Return the environment in which the models that fail are known."""
    known = os.environ.get("PYTHONPATH")
    return {**os.environ, "PYTHONPATH": f"{FAULT}:{known}" if known else str(FAULT), "OMP_NUM_THREADS": "1"}


@dataclass
class LiveServer:
    """A running server."""

    process: subprocess.Popen[str]
    port: int
    log: Path
    key: str | None = None
    host: str = "127.0.0.1"

    @property
    def url(self) -> str:
        """Where it is."""
        return f"http://[{self.host}]:{self.port}" if ":" in self.host else f"http://{self.host}:{self.port}"

    @property
    def headers(self) -> dict[str, str]:
        """What every request brings."""
        return {"authorization": f"Bearer {self.key}"} if self.key else {}

    def http(self, timeout: float = 60.0, address: str | None = None) -> httpx.Client:
        """Return a client, which comes from an address of this machine's."""
        transport = httpx.HTTPTransport(local_address=address)
        return httpx.Client(base_url=self.url, headers=self.headers, timeout=timeout, transport=transport)

    def children(self) -> list[int]:
        """Return the process ids of its workers."""
        path = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        threads = path.parent.parent.glob("*/children") if path.exists() else []
        return sorted(int(pid) for thread in threads for pid in thread.read_text().split())

    def num_descriptors(self) -> int:
        """Return how many files and sockets the server itself holds open."""
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))

    def worker(self) -> int:
        """Return its worker's process id, once there is one."""
        end = time.monotonic() + 30
        while not (found := self.children()):
            assert time.monotonic() < end, "there is no worker"
            time.sleep(0.01)
        return found[0]

    def wait_ready(self, seconds: float = START_SECONDS) -> None:
        """Wait until it says that it is ready."""
        end = time.monotonic() + seconds
        with self.http(5) as http:
            while True:
                assert self.process.poll() is None, self.log.read_text()
                with contextlib.suppress(httpx.HTTPError):
                    if http.get("/readyz").status_code == 200:
                        return
                assert time.monotonic() < end, self.log.read_text()
                time.sleep(0.05)

    def stop(self, number: int = signal.SIGTERM, seconds: float = 40.0) -> int:
        """Send a signal, and return the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(seconds)


@contextlib.contextmanager
def serving(
    folder: Path,
    model: Path | None,
    *arguments: str,
    ready: bool = True,
    key: str | None = None,
    host: str = "127.0.0.1",
    where: Path | None = None,
    most_files: int | None = None,
) -> Iterator[LiveServer]:
    """Run a server until the block ends; it must end well, and leave nothing behind.

    Args:
        folder: for its state and its log.
        model: what it serves; None is the shipped model.
        arguments: further ones.
        ready: whether to wait until it is ready.
        key: that every request must bring.
        host: where it listens, on this machine.
        where: the working directory.
        most_files: that it may open.

    """
    port, log = free_port(), folder / "server.log"
    options = ["--host", host, "--port", str(port), "--state-dir", str(folder / "state")]
    if key is not None:
        (folder / "key").write_text(key)
        options += ["--api-key-file", str(folder / "key")]
    with log.open("a") as stderr:
        process = subprocess.Popen(
            command("serve", *([str(model)] if model else []), *options, *arguments),
            stderr=stderr,
            stdout=subprocess.DEVNULL,
            stdin=subprocess.DEVNULL,
            text=True,
            env={**environment(), "TMPDIR": str(folder)},
            cwd=where,
            preexec_fn=None if most_files is None else partial(limit_files, most_files),
        )
        server = LiveServer(process, port, log, key, host)
        try:
            if ready:
                server.wait_ready()
            yield server
        finally:
            workers = server.children()
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
            try:
                process.wait(40)
            finally:
                process.kill()
        assert process.returncode in (0, 70, -9), log.read_text()
        if process.returncode != -9:
            assert not list(folder.glob("safelight-*")), "a socket's folder is left over"
        assert not [pid for pid in workers if alive(pid)], "a worker is left over"


def limit_files(most: int) -> None:
    """Let this process open so many files."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def alive(pid: int) -> bool:
    """Say whether a process runs (one that has ended and waits to be collected does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except FileNotFoundError:
        return False


def generate(http: httpx.Client, prompt: str = "a cat", **fields: Any) -> httpx.Response:
    """Ask for a picture."""
    return http.post("/v1/images/generations", json={"prompt": prompt, "seed": 0, **fields})
