"""A live server on a model that fails on demand, and what must hold after everything that happens to it."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable

import httpx
import pytest

from tests.live_server import LiveServer, fault_model, generate, serving

CONTROL = "a control request"


def picture_of(response: httpx.Response) -> str:
    """Return a digest of the picture in an answer."""
    assert response.status_code == 200, response.text[:500]
    return hashlib.sha256(response.json()["data"][0]["b64_json"].encode()).hexdigest()


def video_of(http: httpx.Client) -> str:
    """Return a digest of the control request's video."""
    path = f"/v1/videos/{http.post('/v1/videos', json={'prompt': CONTROL, 'seed': 0}).json()['id']}"
    until(lambda: http.get(path).json()["status"] == "completed")
    return hashlib.sha256(http.get(f"{path}/content").content).hexdigest()


INTERNALS = re.compile(r"/|0x|Traceback|torch|CUDA|GiB|Error:|\.py|safelight\.")


def assert_error(response: httpx.Response, status: int, code: str) -> None:
    """Hold an answer to the API's form, and to saying nothing of the inside."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error["code"] == code
    assert not INTERNALS.search(error["message"]), error["message"]
    assert response.headers["x-request-id"]
    if status >= 500:
        assert response.headers["x-should-retry"] == ("true" if code == "not_ready" else "false")


class Healthy:
    """Holds a server to being as it was before: the epilogue of every fault test."""

    def __init__(self, server: LiveServer, control: Callable[[httpx.Client], str] | None = None) -> None:
        self.server = server
        self.answer = control or (lambda http: picture_of(generate(http, CONTROL)))
        with server.http() as http:
            self.control = self.answer(http)
        self.descriptors = server.num_descriptors()

    def __call__(self) -> None:
        """Check that a control request gives the bytes of before, and that the server says that it is ready."""
        self.server.wait_ready(60)
        with self.server.http() as http:
            assert self.answer(http) == self.control
            assert http.get("/readyz").status_code == 200
            assert http.get("/livez").status_code == 200
            metrics = http.get("/metrics").text
        assert gauge(metrics, "safelight_requests_running") == gauge(metrics, "safelight_requests_waiting") == 0
        assert len(self.server.children()) == 1
        until(lambda: self.server.num_descriptors() <= self.descriptors, 10)
        folder = self.server.log.parent
        assert len(list(folder.glob("safelight-*/*.ipc"))) == len(list(folder.glob("safelight-*/*.unit"))) == 1
        assert not list((folder / "state" / "outputs").glob("**/.tmp-*")), "a temporary file is left over"


def gauge(metrics: str, name: str) -> float:
    """Return a figure of `/metrics`."""
    (line,) = [line for line in metrics.splitlines() if line.startswith(f"{name} ")]
    return float(line.split()[1])


def until(condition: Callable[[], object], seconds: float = 20.0) -> None:
    """Wait for something."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.01)


ARGUMENTS = ("--heartbeat-limit", "2", "--unit-limit", "2", "--first-unit-limit", "60", "--max-running", "2")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Return a server of pictures, a step of 20 ms, for all tests of a module: its worker stays alive."""
    folder = tmp_path_factory.mktemp("pictures")
    with serving(folder, fault_model(folder / "model", step_seconds=0.02), *ARGUMENTS) as server:
        yield server


@pytest.fixture
def clips(tmp_path):
    """Return a server of videos, whose decoding takes its time."""
    model = fault_model(tmp_path / "model", "FaultVideoPipeline", step_seconds=0.001, decode_seconds=0.25)
    with serving(tmp_path, model, *ARGUMENTS) as server:
        yield server


@pytest.fixture
def mortal(tmp_path):
    """Return a server of pictures for one test, which may kill its worker: three deaths would end the server."""
    with serving(tmp_path, fault_model(tmp_path / "model", step_seconds=0.02), *ARGUMENTS) as server:
        yield server


@pytest.fixture(scope="module")
def healthy(pictures):
    """Return the epilogue."""
    return Healthy(pictures)
