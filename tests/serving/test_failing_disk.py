"""A disk that fails in the middle of a write: nothing accepted is lost, nothing torn has a name, and it all goes on."""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from PIL import Image

from safelight.errors import StorageBusyError, StorageFailedError, StorageFullError
from safelight.serving.directories import MARKER
from safelight.video import read_frames
from tests.serving.failing_disk import CHANGES, ERRORS, FailingDisk
from tests.serving.http_server import assert_error
from tests.serving.job_server import picture

STORAGE = {error.code for error in (StorageBusyError, StorageFailedError, StorageFullError)}
SECONDS = 20.0
ROUTES = {"image": ("/v1/images/edits", "jobs"), "video": ("/v1/videos", "videos")}


@dataclass
class Failing:
    """A server in a process of its own, on a disk that fails when it is told to."""

    disk: FailingDisk
    http: httpx.Client
    kind: str
    process: subprocess.Popen[str]

    def submit(self, key: str | None = None, prompt: str = "a") -> httpx.Response:
        route = ROUTES[self.kind][0]
        headers = {"prefer": "respond-async", **({"idempotency-key": key} if key else {})}
        if self.kind == "video":
            return self.http.post(route, headers=headers, json={"prompt": prompt, "seed": 1})
        files = {"image": ("a.png", picture(), "image/png")}
        return self.http.post(route, headers=headers, files=files, data={"prompt": prompt, "seed": "1"})

    def job(self, job_id: str) -> httpx.Response:
        return self.http.get(f"/v1/jobs/{job_id}")

    def end(self, job_id: str) -> dict[str, Any]:
        """Wait for the end of a job."""
        job: dict[str, Any]
        until = time.monotonic() + SECONDS
        while (job := self.job(job_id).json())["state"] not in ("completed", "failed"):
            assert time.monotonic() < until, job
            time.sleep(0.005)
        return job

    def check(self, job_id: str, name: str) -> None:
        """Hold a job to its promise: it completed with whole files, or failed and says that it was the disk."""
        job = self.end(job_id)
        if job["state"] == "failed":
            assert job["error"]["code"] in STORAGE, (name, job["error"])
            return
        for index, output in enumerate(job["outputs"]):
            content = self.http.get(f"/v1/jobs/{job_id}/content?index={index}")
            assert content.status_code == 200 and len(content.content) == output["bytes"], (name, content.text[:200])
            is_whole(content.content)


def is_whole(data: bytes) -> None:
    if data[4:8] == b"ftyp":
        assert read_frames(data).shape[0] == 9
    else:
        with Image.open(io.BytesIO(data)) as image:
            image.load()


@contextlib.contextmanager
def failing(tmp_path, kind="image"):
    disk = FailingDisk(tmp_path / "disk", tmp_path / "shim")
    command = [sys.executable, "-m", "tests.serving.failing_server", str(tmp_path / "disk"), kind]
    with (tmp_path / "log").open("ab") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=disk.environment, text=True
        )
    assert process.stdin is not None and process.stdout is not None
    port = int(process.stdout.readline())
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as http:
        try:
            yield Failing(disk, http, kind, process)
        finally:
            disk.heal()
            process.stdin.close()
            code = process.wait(30)
    process.stdout.close()
    assert code == 0, (tmp_path / "log").read_text()[-2000:]


def attempt(server: Failing, name: str, key: str, wait: float) -> str | None:
    """Work on the disk that fails, make it well again, and look at what is left."""
    answer = server.submit(key)
    job_id = answer.json()["id"] if answer.status_code in (200, 202) else None
    if job_id is None:
        assert assert_error(answer, answer.status_code)["code"] in STORAGE, (name, answer.text)
    until = time.monotonic() + wait
    while time.monotonic() < until:
        assert server.http.get("/livez").status_code == 200
        if job_id is not None:
            found = server.job(job_id)
            if found.status_code != 200:
                assert assert_error(found, 503)["code"] in STORAGE, (name, found.text)
            elif found.json()["state"] in ("completed", "failed"):
                break
        time.sleep(0.01)
    ready = server.http.get("/readyz")
    assert ready.status_code == 200 or assert_error(ready, 503)["code"] == "not_ready", name
    server.disk.heal()
    if job_id is not None:
        server.check(job_id, name)
    again = server.submit(key)  # the same request, by the same key: one job
    assert again.status_code in (200, 202), (name, again.text)
    assert job_id in (None, again.json()["id"]), name
    server.check(again.json()["id"], name)
    assert server.http.get("/readyz").status_code == 200, name
    return str(again.json()["id"])


def work(server: Failing, operations) -> int:
    """Return how many calls of these kinds a job takes."""
    server.disk.count(operations)
    assert server.end(server.submit().json()["id"])["state"] == "completed"
    assert server.http.get("/readyz").status_code == 200
    return server.disk.heal()


def sweep(tmp_path, kind, cases):
    with failing(tmp_path, kind) as server:
        ids, places = [], 0
        for operations, error, sampled in cases:
            calls = work(server, operations)
            assert calls > 0, operations
            for after in range(0, calls + 2, max(1, calls // sampled) if sampled else 1):
                for count in (1, 1 << 60):
                    name = f"{'+'.join(operations)} {error} after {after}, {count} times"
                    server.disk.fail(operations, ERRORS[error], after, count)
                    ids.append(attempt(server, name, f"{name}", 0.1))
                    places += 1
        control = server.end(server.submit().json()["id"])
        assert control["state"] == "completed"
        for path in (tmp_path / "disk" / "outputs").iterdir():
            if not path.name.startswith("."):
                with contextlib.suppress(FileNotFoundError):  # the server removes what the disk did not let go
                    is_whole(path.read_bytes())
    with failing(tmp_path, kind) as server:
        for job_id in ids:
            server.check(job_id, "after a restart")
        left = {path.name for path in (tmp_path / "disk" / "outputs").iterdir() if path.name.startswith(".")}
        assert left == {MARKER}
    print(f"{places} failures")


QUICK = [(CHANGES, "EIO", 6), (CHANGES, "ENOSPC", 3)]
ALL = [(CHANGES, error, 0 if error == "EIO" else 12) for error in ERRORS] + [
    ((operation,), "EIO", 12) for operation in ("sync", "open", "read")
]
"""Every call once by one error, and a dozen of them by the others: an attempt takes half a second. A job that ends well
removes no file: the test that follows is of what does."""


def test_a_job_on_a_disk_that_fails(tmp_path):
    sweep(tmp_path, "image", QUICK)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["image", "video"])
@pytest.mark.parametrize("case", ALL, ids=[f"{'+'.join(case[0])}-{case[1]}" for case in ALL])
def test_every_call_of_a_job_fails_once(tmp_path, kind, case):
    sweep(tmp_path, kind, [case])


def test_files_that_the_disk_does_not_let_go_are_removed_later(tmp_path):
    with failing(tmp_path, "video") as server:
        job_id = server.submit().json()["id"]
        assert server.end(job_id)["state"] == "completed"
        outputs = tmp_path / "disk" / "outputs"
        assert len(list(outputs.glob(f"{job_id}.*"))) == 3
        server.disk.fail(("unlink",), ERRORS["EIO"])
        assert server.http.delete(f"/v1/videos/{job_id}").json()["deleted"] is True
        assert server.http.get(f"/v1/videos/{job_id}").status_code == 404
        time.sleep(0.7)  # a sweep passes, and forgets nothing
        assert len(list(outputs.glob(f"{job_id}.*"))) == 3
        server.disk.heal()
        until = time.monotonic() + SECONDS
        while list(outputs.glob(f"{job_id}.*")):
            assert time.monotonic() < until
            time.sleep(0.02)


SPOOL = """
import os, pathlib
from safelight.errors import StorageFailedError, StorageFullError
from safelight.runtime.messages import OutputMade
from safelight.runtime.video_files import SPOOLED_BYTES
from safelight.runtime.transport import spooled_frames
from tests.serving.failing_disk import ERRORS, FOREVER, FailingDisk
import numpy as np

folder, disk = pathlib.Path(os.environ["FAILING_DISK_FOLDER"]), FailingDisk.of_this_process()
arrays = [np.zeros((8, 1024, 1024, 3), np.uint8) for _ in range(2)]
message = OutputMade("r", 0, [array.shape for array in arrays], ["u1"] * 2, 1, {}, {}, [])
for name, error in (("EIO", StorageFailedError), ("ENOSPC", StorageFullError), ("EROFS", StorageFailedError)):
    for after in range(6):
        disk.fail(("write", "open"), ERRORS[name], after)
        try:
            spooled_frames(message, arrays, folder)
        except error as found:
            assert str(folder) not in str(found)
            assert after < 4 and not list(folder.iterdir()), (name, after)
        else:
            assert after >= 4 and len(list(folder.iterdir())) == 2, (name, after)
        disk.heal()
        for path in folder.iterdir():
            path.unlink()
disk.fail(("write",), ERRORS["short"], 0, 3)
spooled_frames(message, arrays, folder)
assert sorted(path.stat().st_size for path in folder.iterdir()) == [arrays[0].nbytes] * 2
"""


def test_a_video_on_its_way_between_two_processes(tmp_path):
    disk = FailingDisk(tmp_path / "disk", tmp_path / "shim")
    (tmp_path / "disk").chmod(0o700)  # as the folder of sockets is
    done = subprocess.run(
        [sys.executable, "-c", SPOOL], env=disk.environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
