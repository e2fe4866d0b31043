"""Requests that fail, hang, or kill the worker: one answer each, and nobody else notices it."""

from __future__ import annotations

import base64
import concurrent.futures
import io
import threading
import time

import pytest
from PIL import Image

from tests.live_server import generate
from tests.reliability.conftest import CONTROL, Healthy, assert_error, gauge, until, video_of


@pytest.mark.parametrize("where", ["encoding", "denoising:1", "decoding"])
@pytest.mark.parametrize(
    ("what", "status", "code"),
    [("raise", 500, "internal_error"), ("oom", 503, "out_of_memory"), ("refuse", 400, "invalid_value")],
)
def test_a_failing_request_is_answered_by_name(pictures, healthy, what, where, status, code):
    """Beside it, another request goes on as if nothing were."""
    with pictures.http() as http, concurrent.futures.ThreadPoolExecutor(1) as pool:
        other = pool.submit(generate, http, CONTROL, num_inference_steps=20)
        assert_error(generate(http, f"[{what}@{where}] a cat"), status, code)
        assert other.result().status_code == 200
    healthy()


def test_where_a_model_was_loaded_from_is_nobodys_business(pictures, healthy):
    paths = ("/v1/models", "/openapi.json", "/metrics", "/v1/models/model/schema", "/readyz")
    with pictures.http() as http:
        answers = [http.get(path).text for path in paths]
        answers += [generate(http, CONTROL).text, generate(http, "[raise@denoising] a cat").text]
        picture = base64.b64decode(generate(http, CONTROL).json()["data"][0]["b64_json"])
    parameters = str(Image.open(io.BytesIO(picture)).info["parameters"])
    assert '"model": "model"' in parameters
    for answer in (*answers, parameters):
        assert str(pictures.log.parent) not in answer and "/model" not in answer.replace("/v1/model", "")
    healthy()


def test_nan_is_never_a_picture(pictures, healthy):
    with pictures.http() as http:
        assert_error(generate(http, "[nan@denoising:1] a cat"), 500, "non_finite_output")
    healthy()


@pytest.mark.parametrize(
    ("stage", "prompt"),
    [("encoding", "[sleep@encoding=1.5] a cat"), pytest.param("decoding", "a cat", marks=pytest.mark.slow)],
)
def test_delete_stops_a_job_outside_its_loop_at_its_next_unit(clips, stage, prompt):
    """Decoding the whole video would take 25 s, in units of 0.25 s."""
    healthy = Healthy(clips, video_of)
    with clips.http() as http:
        job = http.post("/v1/videos", json={"prompt": prompt, "num_frames": 397}).json()["id"]
        until(lambda: http.get(f"/v1/jobs/{job}").json()["stage"] == stage)
        assert http.delete(f"/v1/jobs/{job}").json()["error"]["code"] == "cancelled"
        until(lambda: "safelight_requests_running 0.0" in http.get("/metrics").text, 4)
    healthy()


@pytest.mark.parametrize("stage", ["encoding", "denoising"])
def test_a_client_that_goes_away_stops_the_work(pictures, healthy, stage):
    """At its next unit: the request would have taken 20 s, and nothing runs any more after one."""
    prompt = "a long one" if stage == "denoising" else "[sleep@encoding=1.5] a cat"
    with pictures.http(1.0) as http, pytest.raises(Exception, match="timed out"):
        generate(http, prompt, num_inference_steps=1000)
    with pictures.http() as http:
        assert_quiet(http)
    healthy()


def assert_quiet(http):
    """Hold the worker to doing no more steps, soon: it is the worker that counts them."""
    until(lambda: "safelight_requests_running 0.0" in http.get("/metrics").text, 5)
    time.sleep(1.0)
    before = num_steps(http)
    time.sleep(0.5)
    assert num_steps(http) == before


def num_steps(http):
    return gauge(http.get("/metrics").text, "safelight_step_seconds_count")


def test_delete_stops_a_job_within_a_step(pictures, healthy):
    with pictures.http() as http:
        answer = http.post(
            "/v1/images/generations",
            json={"prompt": "a long one", "num_inference_steps": 1000},
            headers={"prefer": "respond-async"},
        )
        assert answer.status_code == 202
        path = f"/v1/jobs/{answer.json()['id']}"
        until(lambda: http.get(path).json()["step"])
        ended = http.delete(path).json()
        assert (ended["state"], ended["error"]["code"]) == ("failed", "cancelled")
        assert_quiet(http)
        assert http.get(path).json()["state"] == "failed"
    healthy()


@pytest.mark.slow
def test_the_queue_answers_429_at_once_and_loses_nobody(pictures, healthy):
    """256 clients at once, of 16 addresses: each is answered once, and who is refused knows when to come again."""
    answers, slow = [], []
    lock = threading.Lock()

    def ask(seed):
        with pictures.http(120, f"127.0.0.{1 + seed % 16}") as http:
            begun = time.monotonic()
            answer = generate(http, seed=seed)
            with lock:
                answers.append(answer.status_code)
                if answer.status_code == 429:
                    assert float(answer.headers["retry-after"]) > 0
                    slow.append(time.monotonic() - begun)

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(256)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert len(answers) == 256 and set(answers) == {200, 429}
    assert answers.count(200) >= 64
    healthy()
