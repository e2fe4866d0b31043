"""Descriptors: however many connections there are, a worker starts again, and nothing ends the process."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
import subprocess
import sys

import pytest

from safelight.serving.http import listening
from tests.live_server import fault_model, generate, serving
from tests.reliability.conftest import until

SCRIPT = """
import asyncio, os, pathlib, resource, sys, tempfile
from safelight.errors import SafelightError
from safelight.runtime.sockets import LIBRARY
from safelight.runtime.transport import ServerChannel

async def make(folder, is_held, left):
    if is_held:
        LIBRARY.hold()
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    held = []
    try:
        while True:
            held.append(os.open(os.devnull, os.O_RDONLY))
    except OSError:
        pass
    for descriptor in held[:left]:
        os.close(descriptor)
    try:
        ServerChannel(folder / f"{left}.{is_held}.ipc").close()
    except SafelightError:
        pass

folder = pathlib.Path(tempfile.mkdtemp())
for is_held in (True, False):
    for left in range(12):
        child = os.fork()
        if child == 0:
            asyncio.run(make(folder, is_held, left))
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        assert status == 0, (is_held, left, status)
"""


def test_no_descriptors_are_an_error_and_no_abort(tmp_path):
    """Whatever few are left, and whether or not the library runs already."""
    known = {**os.environ, "TMPDIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", SCRIPT], check=True, env=known, timeout=120)


@pytest.mark.parametrize(("limit", "expected"), [(256, 64), (1024, 384), (20000, 2304), (65536, 2304)])
def test_connections_and_their_files_leave_a_reserve(limit, expected):
    assert listening.bound(limit) == expected
    assert 2 * expected + min(listening.RESERVE, limit // 2) <= limit


def test_no_connection_above_the_bound_is_given_out():
    """However many come at once: the others have their turn between, and each is told."""
    with listening.Listener(socket.AF_INET, socket.SOCK_STREAM) as listener, contextlib.ExitStack() as stack:
        listener.bind(("127.0.0.1", 0))
        listener.listen(128)
        listener.setblocking(False)
        listener.bound = 0
        address = listener.getsockname()
        clients = [stack.enter_context(socket.create_connection(address)) for _ in range(listening.AT_ONCE + 5)]
        for _ in range(2):
            with pytest.raises(BlockingIOError):
                listener.accept()
        assert {client.recv(12) for client in clients} == {b"HTTP/1.1 429"}


def test_the_soft_limit_is_raised():
    script = (
        "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (100, 300));"
        "from safelight.serving.http.listening import raise_limit;"
        "print(raise_limit(), resource.getrlimit(resource.RLIMIT_NOFILE))"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert ended.stdout.strip() == "300 (300, 300)"


def test_many_idle_connections_and_a_worker_that_dies(tmp_path):
    """The process may open 1,024 files and no more, as is usual; 1,100 connections come, and stay."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 1400), hard))
    model = fault_model(tmp_path / "model")
    with serving(tmp_path, model, most_files=1024) as server, contextlib.ExitStack() as stack:
        worker = server.worker()
        for _ in range(1100):
            stack.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=5))
        until(lambda: server.num_descriptors() > 300)
        assert server.num_descriptors() < 1024 - listening.RESERVE
        os.kill(worker, signal.SIGKILL)
        until(lambda: server.children() not in ([], [worker]))
        assert server.num_descriptors() > 300, "they are open still"
        stack.close()
        server.wait_ready(60)
        with server.http() as http:
            assert generate(http).status_code == 200
        assert "many are open" in server.log.read_text()
