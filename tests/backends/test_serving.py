"""The package's pipelines in a real server: two outputs, progress, cancelling, and jobs that outlive deaths."""

from __future__ import annotations

import base64
import io
import os
import signal
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.backends.conftest import FIELDS
from tests.live_server import LiveServer, generate, serving
from tests.reliability.conftest import until

pytestmark = pytest.mark.slow
CLASSES = ("StableDiffusionXLPipeline", "StableDiffusion3Pipeline", "KandinskyV22CombinedPipeline")
STEPS = 150


def fields_of(name, **own):
    fields = {key: value for key, value in FIELDS[name].items() if key not in ("height", "width", "image")}
    size = f"{FIELDS[name]['width']}x{FIELDS[name]['height']}"
    return {**fields, "size": size, "num_inference_steps": STEPS, "seed": 4, "n": 2, **own}


def submitted(http, name, **own):
    body = {"prompt": "a cat", **fields_of(name, **own)}
    answer = http.post("/v1/images/generations", json=body, headers={"prefer": "respond-async"})
    assert answer.status_code == 202, answer.text
    return f"/v1/jobs/{answer.json()['id']}"


def step_of(http, path):
    return http.get(path).json()["step"] or 0


def pictures_of(http, path):
    until(lambda: http.get(path).json()["completed_at"] is not None, 120)
    job = http.get(path).json()
    assert job["state"] == "completed", job
    return [
        base64.b64encode(http.get(f"{path}/content", params={"index": index}).content).decode() for index in range(2)
    ]


@pytest.mark.parametrize("name", CLASSES)
def test_a_job_gives_its_bytes_after_the_death_of_its_worker_and_of_its_server(checkpoint, name, tmp_path):
    with serving(tmp_path, checkpoint(name)) as server, server.http() as http:
        answer = generate(http, **fields_of(name))
        assert answer.status_code == 200, answer.text
        wanted = [each["b64_json"] for each in answer.json()["data"]]
        assert len(set(wanted)) == 2
        path, cancelled = submitted(http, name), submitted(http, name, num_inference_steps=600)
        until(lambda: step_of(http, path) >= 5)
        os.kill(server.worker(), signal.SIGKILL)
        until(lambda: 0 < step_of(http, path) < STEPS, 90)
        assert http.delete(cancelled).json()["error"]["code"] == "cancelled"
        assert pictures_of(http, path) == wanted
        path = submitted(http, name)
        until(lambda: step_of(http, path) >= 5)
        server.process.kill()
        server.process.wait(10)
    with serving(tmp_path, checkpoint(name)) as server, server.http() as http:
        assert pictures_of(http, path) == wanted
        idle = num_threads(server)
        assert pictures_of(http, submitted(http, name, seed=9)) != wanted
        path = submitted(http, name, num_inference_steps=600)
        until(lambda: step_of(http, path) >= 5)
        assert num_threads(server) > idle and http.delete(path).status_code == 200
        until(lambda: num_threads(server) == idle)


def num_threads(server: LiveServer) -> int:
    """Return how many threads a worker has."""
    return len(list(Path(f"/proc/{server.worker()}/task").iterdir()))


def test_a_servers_stacked_requests_are_as_those_alone(checkpoint, tmp_path):
    """In pixels within rounding; and they were stacked, as its metrics say."""
    name, found = "StableDiffusion3Pipeline", {}
    for batching in ("exact", "throughput"):
        (tmp_path / batching).mkdir()
        with serving(tmp_path / batching, checkpoint(name), "--batching", batching) as server, server.http() as http:
            paths = [submitted(http, name, seed=seed) for seed in (1, 10)]
            made = [pixels(each) for path in paths for each in pictures_of(http, path)]
            lines = [
                line.split()
                for line in http.get("/metrics").text.splitlines()
                if line.startswith("safelight_batch_size_")
            ]
            counts = {line[0]: float(line[1]) for line in lines}
            alone, of_all = counts['safelight_batch_size_bucket{le="1.0"}'], counts["safelight_batch_size_count"]
            found[batching] = np.stack(made), alone / of_all
    exact, stacked = found["exact"], found["throughput"]
    assert np.abs(exact[0] - stacked[0]).max() <= 1 < np.abs(exact[0][0] - exact[0][1]).max()
    assert exact[1] == 1 and stacked[1] < 0.5


def pixels(picture: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(picture)))).astype(int)
