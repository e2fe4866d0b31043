"""Memory that is not there: in a control group with a limit of its own, as a container's."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from safelight.loading.repository import SHIPPED_MODEL
from safelight.runtime.host_memory import FIRST, HostMemory
from tests.live_server import alive, generate, serving
from tests.reliability.conftest import until

SHAPES = SHIPPED_MODEL
LARGE: dict[str, Any] = {"size": "1024x1024", "num_inference_steps": 1}
"""Whose decoding takes 390 MiB."""
HOG = """
import sys
held = []
while "oom_kill 0" in open(sys.argv[1]).read():
    held.append(bytearray(4 << 20))
"""
"""Takes memory until the kernel has killed somebody for it."""


class Group:
    """A control group of this test's."""

    def __init__(self, path: Path, dialect):
        self.path, self.dialect = path, dialect

    def limit(self, num_bytes):
        (self.path / self.dialect.limits[0]).write_text(str(num_bytes))

    @property
    def used(self):
        return int((self.path / self.dialect.used).read_text())

    @property
    def kills(self):
        found = re.search(r"^oom_kill (\d+)$", self.killed.read_text(), re.MULTILINE)
        assert found is not None
        return int(found[1])

    @property
    def killed(self):
        return self.path / self.dialect.kills

    @contextmanager
    def inside(self):
        """Have what is started belong to the group."""
        known = next(HostMemory()._find_groups())[0]
        (self.path / "cgroup.procs").write_text(str(os.getpid()))
        try:
            yield
        finally:
            (known / "cgroup.procs").write_text(str(os.getpid()))


@pytest.fixture
def group():
    own = next(HostMemory()._find_groups(), None)
    if own is None:
        pytest.skip("there are no control groups of memory here")
    folder, dialect = own
    parent = folder if dialect is FIRST else folder.parent  # groups of the second version hold processes or groups
    path = parent / f"safelight-test-{os.getpid()}"
    try:
        path.mkdir()
    except OSError as error:
        pytest.skip(f"a control group cannot be made here: {error}")
    try:
        if not (path / dialect.used).exists():
            pytest.skip("groups beside this one have no memory controller")
        yield Group(path, dialect)
    finally:
        until(lambda: not (path / "cgroup.procs").read_text().strip())
        path.rmdir()


@contextmanager
def server_in(group, tmp_path, limit=4 << 30):
    group.limit(limit)
    with group.inside():
        context = serving(tmp_path, SHAPES, "--max-running", "2")
        server = context.__enter__()
    try:
        yield server
    finally:
        context.__exit__(None, None, None)


def leave(group, num_bytes):
    """Set the limit so that so much is left."""
    memory = group.used - sum(
        int(line.split()[1])
        for line in (group.path / "memory.stat").read_text().splitlines()
        if line.split()[0] in group.dialect.cached
    )
    group.limit(memory + num_bytes)


@pytest.mark.slow
def test_what_is_not_there_is_refused_and_nobody_is_killed(group, tmp_path):
    with server_in(group, tmp_path) as server, server.http(120) as http:
        worker = server.worker()
        assert generate(http, num_inference_steps=1).status_code == 200
        leave(group, 250 << 20)
        refused = generate(http, **LARGE)
        assert refused.status_code == 503, refused.text
        error = refused.json()["error"]
        assert error["code"] == "out_of_memory"
        assert re.search(r"decoding needs about .* of memory for this request, and .* are free", error["message"])
        assert generate(http, num_inference_steps=1).status_code == 200
        leave(group, 1 << 30)
        assert generate(http, **LARGE).status_code == 200, "what fits is taken"
        assert server.worker() == worker and group.kills == 0


@pytest.mark.slow
def test_what_can_never_fit_is_told_at_once(group, tmp_path):
    with server_in(group, tmp_path, 1 << 30) as server, server.http(120) as http:
        worker = server.worker()
        refused = generate(http, size="2048x2048", num_inference_steps=1)
        assert refused.status_code == 400, refused.text
        assert refused.json()["error"]["param"] == "size"
        assert "decoding needs about 1.5" in refused.json()["error"]["message"]
        assert generate(http, num_inference_steps=1).status_code == 200
        assert server.worker() == worker and group.kills == 0


@pytest.mark.slow
def test_the_kernel_takes_the_worker_and_the_log_says_so(group, tmp_path):
    """Memory is taken elsewhere in the group, while a request runs: that one is answered, the next ones run."""
    with server_in(group, tmp_path) as server, server.http(120) as http:
        worker = server.worker()
        api = server.process.pid
        assert oom_score(worker) >= oom_score(api) + 500
        leave(group, 600 << 20)
        with ThreadPoolExecutor(1) as threads:
            asked = threads.submit(generate, http, num_inference_steps=1000, size="512x512")
            until(lambda: "safelight_requests_running 1.0" in http.get("/metrics").text)
            with group.inside():
                hog = subprocess.Popen([sys.executable, "-c", HOG, str(group.killed)])
            try:
                answered = asked.result()
            finally:
                hog.kill()
                hog.wait()
        assert answered.status_code == 503 and answered.json()["error"]["code"] == "worker_lost", answered.text
        assert group.kills >= 1 and not alive(worker)
        (line,) = [line for line in server.log.read_text().splitlines() if "the worker died" in line]
        assert "killed by SIGKILL, by the kernel, because the memory of its control group ran out" in line
        server.wait_ready()
        assert server.process.pid == api and server.process.poll() is None
        assert generate(http, num_inference_steps=1).status_code == 200


def oom_score(pid):
    return int(Path(f"/proc/{pid}/oom_score_adj").read_text())
