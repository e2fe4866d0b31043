"""What surrounds every request: HEAD, one form of a path, and the id that the log has."""

from __future__ import annotations

import logging
import re
import time
from typing import Any

import httpx
import pytest

from tests.serving.http_server import PROMPT, assert_error, next_answer, running
from tests.serving.wire import (
    ASYNC,
    GENERATIONS,
    KEY,
    finished_job,
    flat,
    raw_request,
)


def get_routes(server):
    app = server.server.config.loaded_app
    return sorted({re.sub(r"\{[^}]*\}", "x", route.path) for route in flat(app) if "GET" in route.methods})


def test_head_is_wherever_get_is(server):
    with server.http() as http:
        job = http.post(GENERATIONS, json={"prompt": PROMPT}, headers=ASYNC).json()["id"]
        finished_job(http, job)
        routes = [
            path.replace("/jobs/x", f"/jobs/{job}").replace("/models/x", "/models/tiny") for path in get_routes(server)
        ]
        assert len(routes) >= 14
        for path in routes:
            got, head = http.get(path), http.head(path)
            assert head.status_code == got.status_code and head.content == b"", path
            varying = ("date", "x-request-id", *(["content-length"] if path == "/metrics" else []))
            headers = [{k: v for k, v in each.headers.items() if k not in varying} for each in (got, head)]
            assert headers[0] == headers[1], path
        assert_error(http.get("/nowhere"), 404)
        assert http.head("/nowhere").status_code == 404 and http.head(GENERATIONS).status_code == 405
    assert httpx.head(f"{server.url}/v1/models").status_code == 401


def test_a_connection_is_kept_after_head(server):
    head = f"HEAD /v1/models HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {KEY}\r\n\r\n".encode()
    with server.connect(head * 3) as sock, sock.makefile("rb") as file:
        for _ in range(3):
            assert file.readline().startswith(b"HTTP/1.1 200")
            while file.readline() != b"\r\n":
                pass
        sock.sendall(b"GET /livez HTTP/1.1\r\nhost: localhost\r\n\r\n")
        assert next_answer(file)[2] == {"status": "ok"}


def test_head_of_a_stream_does_not_wait_for_its_end(tmp_path):
    with running(tmp_path) as server, server.http() as http:
        job = http.post(GENERATIONS, json={"prompt": "[hold]"}, headers=ASYNC).json()["id"]
        server.until(lambda: server.engine.stats.num_running == 1)
        began = time.monotonic()
        assert http.head(f"/v1/jobs/{job}/events").headers["content-type"].startswith("text/event-stream")
        assert time.monotonic() - began < 5
        server.call(server.engine.release)
        assert finished_job(http, job)["state"] == "completed"


def spelled(path):
    """Yield a path with slashes that say nothing."""
    yield path + "/"
    yield path + "//"
    yield "/" + path
    yield path.replace("/", "//")
    yield path.replace("/", "///") + "/"


def test_slashes_that_say_nothing(server, anybody):
    with server.http() as http:
        for path in get_routes(server):
            plain = http.get(path)
            for other in spelled(path):
                answer = anybody.send(raw_request(server, other, KEY))
                assert answer.status_code == plain.status_code, other
                if plain.headers["content-type"] == "application/json" and path != "/":
                    assert answer.json() == plain.json(), other
                open_to_all = anybody.send(raw_request(server, other))
                assert (open_to_all.status_code == 200) == (path == "/livez"), other
        for other in spelled(GENERATIONS):
            request = raw_request(server, other, KEY, method="POST", json={"prompt": PROMPT})
            assert anybody.send(request).status_code == 200


@pytest.mark.parametrize("target", ["http://other.example/livez", "HTTP://x:1//livez/", "http://x"])
def test_a_target_in_absolute_form(server, target):
    answer = server.raw(f"GET {target} HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {KEY}\r\n\r\n".encode())
    assert answer[0] == 200 and ("status" in answer[2]) == ("livez" in target)


FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "stream": {"stream": True},
    "url": {"response_format": "url"},
    "job": {},
}


def ids_in_log(caplog):
    return [set(re.findall(r"req_[0-9a-f]{32}", record.getMessage())) for record in caplog.records]


@pytest.mark.parametrize("prompt", ["[garbage]", "[fail:internal_error]"])
@pytest.mark.parametrize("form", FORMS)
def test_the_log_has_the_id_of_a_failed_request(server, caplog, prompt, form):
    with caplog.at_level(logging.ERROR), server.http() as http:
        answer = http.post(GENERATIONS, json={"prompt": prompt, **FORMS[form]}, headers=ASYNC if form == "job" else {})
        told = answer.headers["x-request-id"]
        if form == "job":
            job = finished_job(http, answer.json()["id"])
            assert job["error"]["code"] == "internal_error"
            assert any(job["id"] in record.getMessage() for record in caplog.records)
        else:
            assert "internal_error" in answer.text and "x-request-id" in answer.text
    assert {told} in ids_in_log(caplog), [record.getMessage() for record in caplog.records]
    assert server.engine.submitted[-1].request_id.endswith(told), "the worker's log names it by this"


def test_an_id_is_told_of_a_job_that_another_request_sent(server, caplog):
    """Two requests of one idempotency key wait for one job: each finds it by its own id."""
    with caplog.at_level(logging.ERROR), server.http() as http:
        headers = {"idempotency-key": "one of two"}
        body = {"prompt": "[fail:internal_error] twice", "response_format": "url"}
        answers = [http.post(GENERATIONS, json=body, headers=headers) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [500, 500]
    for answer in answers:
        lines = [r.getMessage() for r in caplog.records if answer.headers["x-request-id"] in r.getMessage()]
        assert any(re.search("image_[0-9a-f]{32}", line) for line in lines)


def test_what_is_no_mistake_of_ours_is_not_logged(server, caplog):
    with caplog.at_level(logging.ERROR), server.http() as http:
        assert_error(http.post(GENERATIONS, json={"prompt": "[fail:out_of_memory]"}), 503)
        assert_error(http.post(GENERATIONS, json={"size": 3}), 400, "size")
    assert caplog.records == []
