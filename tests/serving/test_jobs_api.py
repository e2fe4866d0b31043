"""Jobs on the wire: how a request becomes one, what is told of it, its files and parts of them, and its end."""

from __future__ import annotations

import pytest

from tests.serving.http_server import PROMPT, assert_error, running
from tests.serving.stub_engine import IMAGE_TO_VIDEO_SCHEMA, VIDEO_SCHEMA
from tests.serving.wire import ASYNC, GENERATIONS, events_of, finished_job, png


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with running(tmp_path_factory.mktemp("jobs")) as server:
        yield server


@pytest.fixture(scope="module")
def http(server):
    with server.http() as http:
        yield http


def test_respond_async(http, server):
    answer = http.post(
        GENERATIONS, json={"prompt": PROMPT, "n": 2, "seed": 3}, headers={"prefer": "wait=1, Respond-Async"}
    )
    assert answer.status_code == 202 and answer.headers["preference-applied"] == "respond-async"
    job = answer.json()
    assert answer.headers["location"] == f"/v1/jobs/{job['id']}"
    assert job["object"] == "job" and job["kind"] == "image" and job["model"] == "org/tiny"
    done = finished_job(http, job["id"])
    assert done["state"] == "completed" and done["progress"] == 100 and done["seed"] == 3
    assert [output["seed"] for output in done["outputs"]] == [3, 4]
    assert done["params"]["num_inference_steps"] == 4 and "output_type" not in done["params"]
    assert done["completed_at"] >= done["started_at"] >= done["created_at"]
    for output in done["outputs"]:
        content = http.get(output["url"])
        assert content.headers["content-type"] == output["media_type"] == "image/png"
        assert len(content.content) == output["bytes"]
    assert_error(http.get(f"/v1/jobs/{job['id']}/content?index=2"), 400, "index")
    assert_error(http.get(f"/v1/jobs/{job['id']}/content?variant=thumbnail"), 400, "variant")
    assert_error(http.get(f"/v1/videos/{job['id']}"), 404)


def test_progress_and_events(tmp_path):
    with running(tmp_path, step_seconds=0.02) as server, server.http() as http:
        first = http.post(GENERATIONS, json={"prompt": "[hold]"}, headers=ASYNC).json()
        second = http.post(GENERATIONS, json={"prompt": PROMPT}, headers=ASYNC).json()
        server.until(lambda: (progress := server.jobs.events.progress(first["id"])) is not None and progress.step == 3)
        running_job = http.get(f"/v1/jobs/{first['id']}").json()
        assert (running_job["state"], running_job["stage"]) == ("in_progress", "denoising")
        assert (running_job["step"], running_job["num_inference_steps"], running_job["progress"]) == (3, 4, 75)
        waiting = http.get(f"/v1/jobs/{second['id']}").json()
        assert (waiting["state"], waiting["queue_position"], waiting["step"]) == ("queued", 0, None)
        seen = []
        with http.stream("GET", f"/v1/jobs/{second['id']}/events") as response:
            assert response.headers["content-type"].startswith("text/event-stream")
            for name, data in events_of(response):
                seen.append(name)
                assert data["type"] == name and data["job"]["id"] == second["id"]
                if name == "queued":
                    server.call(server.engine.release)
        kinds = list(dict.fromkeys(seen))
        assert kinds == ["queued", "started", "step", "completed"]
        assert data["job"]["outputs"] and data["job"]["state"] == "completed"
        with http.stream("GET", f"/v1/jobs/{second['id']}/events") as response:
            assert [name for name, _ in events_of(response)] == ["completed"]


def test_cancel_by_delete(http, server):
    job = http.post(GENERATIONS, json={"prompt": "[hold] it"}, headers=ASYNC).json()
    server.until(lambda: server.engine.stats.num_running == 1)
    ended = http.delete(f"/v1/jobs/{job['id']}")
    assert ended.status_code == 200
    assert (ended.json()["state"], ended.json()["error"]["code"]) == ("failed", "cancelled")
    server.until(lambda: server.engine.stats.num_running == 0)
    again = http.delete(f"/v1/jobs/{job['id']}").json()
    assert again["error"]["code"] == "cancelled"
    assert_error(http.get(f"/v1/jobs/{job['id']}/content"), 409)


def test_idempotency_key(tmp_path):
    with running(tmp_path, VIDEO_SCHEMA) as server, server.http() as http:
        headers = {"idempotency-key": "key-1"}
        answers = [http.post("/v1/videos", json={"prompt": PROMPT}, headers=headers) for _ in range(3)]
        assert len({answer.json()["id"] for answer in answers}) == 1
        other = http.post("/v1/videos", json={"prompt": "another"}, headers=headers)
        assert assert_error(other, 409)["code"] == "idempotency_conflict"
        form = http.post("/v1/videos", files={"prompt": (None, PROMPT)}, headers={"idempotency-key": "key-2"})
        assert form.json()["id"] != answers[0].json()["id"]
        assert len(http.get("/v1/videos").json()["data"]) == 2
        for key in ("", "k" * 256):
            assert_error(http.post("/v1/videos", json={"prompt": "x"}, headers={"idempotency-key": key}), 400)


def test_files_are_part_of_what_a_key_stands_for(tmp_path):
    with running(tmp_path, IMAGE_TO_VIDEO_SCHEMA) as server, server.http() as http:
        statuses = []
        for size in ((32, 32), (32, 32), (48, 48)):
            files = {"prompt": (None, "x"), "input_reference": ("a", png(size))}
            statuses.append(http.post("/v1/videos", files=files, headers={"idempotency-key": "k"}).status_code)
        assert statuses == [200, 200, 409]


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    with running(tmp_path_factory.mktemp("content"), VIDEO_SCHEMA) as server, server.http() as http:
        job = http.post("/v1/videos", json={"prompt": PROMPT}).json()
        finished_job(http, job["id"])
        path = f"/v1/videos/{job['id']}/content"
        yield http, path, http.get(path).content


@pytest.mark.parametrize(
    ("ranges", "part"),
    [
        ("bytes=0-9", slice(0, 10)),
        ("bytes=5-", slice(5, None)),
        ("bytes=-7", slice(-7, None)),
        ("bytes=0-99999999999", slice(0, None)),
        ("bytes=-99999999999", slice(0, None)),
        ("bytes = 3-3", slice(3, 4)),
    ],
)
def test_one_range(video, ranges, part):
    http, path, whole = video
    answer = http.get(path, headers={"range": ranges})
    assert answer.status_code == 206 and answer.content == whole[part]
    start = part.indices(len(whole))[0]
    assert answer.headers["content-range"] == f"bytes {start}-{start + len(whole[part]) - 1}/{len(whole)}"


@pytest.mark.parametrize(
    "ranges", ["bytes=0-1,4-5", "bytes=x-y", "bytes=5-3", "items=0-1", "bytes", "bytes=-", "bytes=\uff11-"]
)
def test_what_is_no_single_range_gives_the_whole(video, ranges):
    http, path, whole = video
    answer = http.get(path, headers={"range": ranges.encode()})
    assert answer.status_code == 200 and answer.content == whole
    assert answer.headers["accept-ranges"] == "bytes"


def test_ranges_that_are_refused(video):
    http, path, whole = video
    beyond = http.get(path, headers={"range": f"bytes={len(whole)}-"})
    assert_error(beyond, 416, "range")
    assert beyond.headers["content-range"] == f"bytes */{len(whole)}"
    assert_error(http.get(path, headers={"range": "bytes=-0"}), 416, "range")
    many = "bytes=" + ",".join(f"{n}-{n}" for n in range(2000))
    assert_error(http.get(path, headers={"range": many}), 400, "range")
    assert_error(http.get(path + "?variant=poster"), 400, "variant")
    stale = http.get(path, headers={"range": "bytes=0-1", "if-range": '"another"'})
    assert stale.status_code == 200 and stale.content == whole


def test_a_client_that_leaves_a_job_leaves_it_running(tmp_path):
    with running(tmp_path, VIDEO_SCHEMA, step_seconds=0.02) as server:
        with server.http() as http:
            job = http.post("/v1/videos", json={"prompt": PROMPT}).json()
        with server.http() as http:
            assert finished_job(http, job["id"])["state"] == "completed"
