"""Pictures: answered at once, as a stream, as addresses, or as a job; and what ends them."""

from __future__ import annotations

import json

import pytest

from tests.serving.http_server import PROMPT, assert_error, running
from tests.serving.stub_engine import EDIT_SCHEMA
from tests.serving.wire import (
    ASYNC,
    GENERATIONS,
    finished_job,
    png,
)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with running(tmp_path_factory.mktemp("api")) as server:
        yield server


@pytest.fixture(scope="module")
def http(server):
    with server.http() as http:
        yield http


def test_an_edit_as_a_job(tmp_path):
    with running(tmp_path, EDIT_SCHEMA) as server, server.http() as http:
        files = {"image": ("a", png(), "image/png")}
        job = http.post("/v1/images/edits", data={"prompt": "x"}, files=files, headers=ASYNC).json()
        assert finished_job(http, job["id"])["state"] == "completed"
        assert server.engine.submitted[-1].params.set_fields()["image"][0].size == (32, 48)


def test_a_stream_cannot_be_a_job(http):
    assert_error(http.post(GENERATIONS, json={"prompt": PROMPT, "stream": True}, headers=ASYNC), 400, "stream")


def test_an_address_of_a_failed_generation_is_its_error(http):
    answer = http.post(GENERATIONS, json={"prompt": "[fail:out_of_memory]", "response_format": "url"})
    assert assert_error(answer, 503)["code"] == "out_of_memory"


@pytest.mark.parametrize("more", [{}, {"stream": True}, {"response_format": "url"}], ids=["plain", "stream", "url"])
def test_a_client_that_leaves_ends_its_request_within_a_step(tmp_path, more):
    body = json.dumps({"prompt": PROMPT, "num_inference_steps": 1000, **more}).encode()
    head = f"POST {GENERATIONS} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    request = head.encode() + b"content-length: %d\r\n\r\n" % len(body) + body
    with running(tmp_path, step_seconds=0.05) as server:
        sock = server.connect(request)
        server.until(lambda: server.engine.stats.num_running == 1)
        waiting = server.connect(request)
        server.until(lambda: server.engine.stats.num_waiting == 1)
        waiting.close()
        server.until(lambda: server.engine.stats.num_waiting == 0, 1.0)
        sock.close()
        server.until(lambda: server.engine.stats.num_running == 0, 1.0)
        assert server.engine.begun == [server.engine.submitted[0].request_id]
        with server.http() as http:
            counted = 'safelight_requests_total{status="499",task="T2I"} 2.0' in http.get("/metrics").text
            assert counted
            assert http.post(GENERATIONS, json={"prompt": PROMPT}).status_code == 200


@pytest.mark.parametrize(
    ("code", "status"),
    [("out_of_memory", 503), ("worker_lost", 503), ("non_finite_output", 500), ("deadline_exceeded", 504)],
)
def test_what_the_engine_fails_with(http, code, status):
    assert assert_error(http.post(GENERATIONS, json={"prompt": f"[fail:{code}@2]"}), status)["code"] == code


def test_an_alpha_channel_in_a_jpeg(http):
    answer = http.post(GENERATIONS, json={"prompt": "[alpha]", "output_format": "jpeg"})
    assert_error(answer, 400, "output_format")
