"""What is ours on the wire: jobs, events, keys, health, metrics, and who is told what."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import io
import json
import re
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from safelight.runtime.client import State
from safelight.serving.limits import Limits
from tests.serving.http_server import PROMPT, assert_error, running
from tests.serving.stub_engine import EDIT_SCHEMA, IMAGE_TO_VIDEO_SCHEMA

JSON = {"content-type": "application/json"}
ASYNC = {"prefer": "respond-async"}
GENERATIONS = "/v1/images/generations"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with running(tmp_path_factory.mktemp("api")) as server:
        yield server


@pytest.fixture(scope="module")
def http(server):
    with server.http() as http:
        yield http


def png(size=(32, 48)):
    file = io.BytesIO()
    Image.new("RGB", size).save(file, "PNG")
    return file.getvalue()


def finished_job(http, job_id):
    end = time.monotonic() + 10
    while (job := http.get(f"/v1/jobs/{job_id}").json())["state"] not in ("completed", "failed"):
        assert time.monotonic() < end
        time.sleep(0.01)
    return job


# keys


def test_every_route_but_livez_needs_the_key(tmp_path):
    """Walk all routes there are, with no key, a wrong one, and one of another form."""
    with running(tmp_path, key="sk-right") as server, httpx.Client(base_url=server.url) as http:
        app = server.server.config.loaded_app
        routes = [(method, route.path) for route in flat(app) for method in sorted(route.methods)]
        assert len(routes) > 15
        wrong = [
            "",
            "Bearer",
            "Bearer sk-wrong",
            "Bearer sk-right2",
            "Bearersk-right",
            "Token sk-right",
            "sk-right",
            "Basic c2stcmlnaHQ=",
        ]
        for method, path in [*routes, ("GET", "/nowhere"), ("PATCH", "/v1/videos"), ("GET", "/%2Flivez")]:
            path = re.sub(r"\{[^}]*\}", "x", path)
            for key in wrong:
                answer = http.request(method, path, headers={"authorization": key} if key else {})
                if path == "/livez":
                    assert answer.status_code == 200
                else:
                    assert_error(answer, 401)
                    assert answer.headers["www-authenticate"] == "Bearer"
        with server.http() as right:
            assert right.get("/v1/models").status_code == 200
            upgrade = {"connection": "upgrade", "upgrade": "websocket", "sec-websocket-version": "13"}
            assert right.get("/v1/models", headers=upgrade).status_code == 200  # there are no websockets


def flat(app):
    found: list[Any] = []
    for route in app.routes:
        inner = vars(route).get("original_router")
        found += flat(inner) if inner is not None else [route]
    return found


def test_a_wrong_key_is_refused_before_the_body_is_read(tmp_path):
    with running(tmp_path, key="sk-right") as server:
        answer = server.raw(b"POST /v1/videos HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1000000\r\n\r\n")
        assert answer[0] == 401


# jobs


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


# who goes away


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


@pytest.mark.parametrize(("addresses", "served"), [(1, 32), (16, 64)])
def test_256_clients_at_once(tmp_path, addresses, served):
    """Served and refused are all that were sent, and whoever is refused is told when to come again.

    Those of one address have half of the places, and those of many have all.
    """

    async def send():
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        async with contextlib.AsyncExitStack() as stack:
            clients = []
            for at in range(addresses):
                transport = httpx.AsyncHTTPTransport(local_address=f"127.0.0.{1 + at}", limits=limits)
                client = httpx.AsyncClient(base_url=url, timeout=60, transport=transport)
                clients.append(await stack.enter_async_context(client))
            posts = (clients[at % addresses].post(GENERATIONS, json={"prompt": PROMPT}) for at in range(256))
            return await asyncio.gather(*posts)

    with running(tmp_path, max_waiting=64, step_seconds=0.01) as server:
        url = server.url
        answers = asyncio.run(send())
        counts = collections.Counter(answer.status_code for answer in answers)
        assert counts[200] + counts[429] == 256 and counts[200] >= served and counts[429] > 0
        for answer in answers:
            if answer.status_code == 429:
                assert_error(answer, 429)
                assert int(answer.headers["retry-after"]) >= 1
        assert server.engine.stats.num_waiting == 0


# failures


def test_a_mistake_of_ours_is_a_500_without_its_insides(http, caplog):
    error = assert_error(http.post(GENERATIONS, json={"prompt": "[garbage]"}), 500)
    assert error["code"] == "internal_error" and error["type"] == "server_error"
    assert len([record for record in caplog.records if record.levelname == "ERROR"]) == 1
    told = assert_error(http.post(GENERATIONS, json={"prompt": "[fail:internal_error]"}), 500)["message"]
    assert "stub" not in told and "x-request-id" in told
    assert http.get("/livez").status_code == 200


@pytest.mark.parametrize(
    ("code", "status"),
    [("out_of_memory", 503), ("worker_lost", 503), ("non_finite_output", 500), ("deadline_exceeded", 504)],
)
def test_what_the_engine_fails_with(http, code, status):
    assert assert_error(http.post(GENERATIONS, json={"prompt": f"[fail:{code}@2]"}), status)["code"] == code


def test_an_alpha_channel_in_a_jpeg(http):
    answer = http.post(GENERATIONS, json={"prompt": "[alpha]", "output_format": "jpeg"})
    assert_error(answer, 400, "output_format")


def gettable(http):
    """Return the paths that are there for GET, with the served model, and an id that no job has."""
    described = http.get("/openapi.json").json()["paths"]
    paths = [path.replace("{model}", "tiny") for path, ways in described.items() if "get" in ways]
    return ["/openapi.json", *(re.sub(r"\{\w+\}", "video_none", path) for path in paths)]


def test_while_the_model_is_loaded(tmp_path):
    with running(tmp_path, state="loading") as server, server.http() as http:
        for answer in (
            http.post(GENERATIONS, json={"prompt": PROMPT}),
            http.post("/v1/videos", json={"prompt": PROMPT}),
            http.get("/readyz"),
            http.get("/v1/models/tiny/schema"),
        ):
            assert assert_error(answer, 503)["code"] == "not_ready"
        statuses = {path: http.get(path).status_code for path in gettable(http)}
        statuses.pop("/", None)  # which says what this is, whatever the model does
        text = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
        (sentence,) = re.findall(r"Until the model is loaded.*?\n\n", text, re.DOTALL)
        named = set(re.findall(r"`(/[\w./]*)`", sentence)) - {"/readyz"}
        for path, status in statuses.items():
            of_jobs = path.startswith(("/v1/videos", "/v1/jobs"))
            is_named = any(path == name or (name != "/" and path.startswith(f"{name}/")) for name in named)
            assert status in ((200, 404) if of_jobs else (200,) if is_named and "schema" not in path else (503,)), path
        assert named <= statuses.keys()
        server.call(lambda: setattr(server.engine, "state", "ready"))
        assert http.get("/readyz").json() == {"status": "ready"}
        states: tuple[State, ...] = ("restarting", "failed", "draining")
        for state in states:
            server.call(partial(setattr, server.engine, "state", state))
            assert state in assert_error(http.get("/readyz"), 503)["message"]


def test_readyz_tells_of_the_disk(tmp_path):
    with running(tmp_path) as server, server.http() as http:
        (tmp_path / "outputs").rename(tmp_path / "gone")
        assert "cannot be written" in assert_error(http.get("/readyz"), 503)["message"]
        (tmp_path / "gone").rename(tmp_path / "outputs")
        assert http.get("/readyz").status_code == 200


# what is told


@pytest.mark.parametrize(
    ("origin", "status"), [("http://evil.example", 403), ("null", 403), ("http://{host}", 200), (None, 200)]
)
def test_web_pages_of_others_are_not_answered_without_a_key(tmp_path, origin, status):
    with running(tmp_path) as server, server.http() as http:
        host = server.url.removeprefix("http://")
        headers = {} if origin is None else {"origin": origin.format(host=host)}
        answer = http.post(GENERATIONS, json={"prompt": PROMPT}, headers=headers)
        assert answer.status_code == status
        if status == 403:
            assert_error(answer, 403)
    with running(tmp_path / "key", key="a key of many characters") as server, server.http() as http:
        answer = http.post(GENERATIONS, json={"prompt": PROMPT}, headers={"origin": "http://evil.example"})
        assert answer.status_code == 200, "a page that knows the key may"


def test_metrics(tmp_path):
    with running(tmp_path, step_seconds=0.005) as server, server.http() as http:
        http.post(GENERATIONS, json={"prompt": PROMPT, "n": 2})
        http.post(GENERATIONS, json={"prompt": PROMPT, "size": "x"})
        http.post(GENERATIONS, json={"prompt": "[fail:out_of_memory]", "stream": True})
        finished_job(http, http.post(GENERATIONS, json={"prompt": PROMPT}, headers=ASYNC).json()["id"])
        http.post(GENERATIONS, json={"prompt": "[fail:out_of_memory]", "response_format": "url"})
        end = time.monotonic() + 10  # jobs are counted when they have ended, which their clients hear first
        while 'requests_total{status="503",task="T2I"} 2.0' not in http.get("/metrics").text:
            assert time.monotonic() < end
        text = http.get("/metrics").text
    for line in (
        'safelight_requests_total{status="200",task="T2I"} 2.0',
        'safelight_requests_total{status="400",task="T2I"} 1.0',
        'safelight_errors_total{code="invalid_value"} 1.0',
        "safelight_outputs_total 3.0",
        "safelight_requests_running 0.0",
        "safelight_requests_waiting 0.0",
        "safelight_request_duration_seconds_count 2.0",
        "safelight_queue_seconds_count 2.0",
        'safelight_stage_seconds_count{stage="denoising"} 2.0',
        "safelight_gpu_memory_bytes 0.0",
        "safelight_model_load_seconds 0.0",
    ):
        assert line in text, line
    counts = [
        line.split()[1] for line in text.splitlines() if re.match("safelight_(step_seconds|batch_size)_count ", line)
    ]
    assert len(counts) == 2 and counts[0] == counts[1] and float(counts[0]) >= 3


def test_the_schema_of_requests(http):
    schema = http.get("/v1/models/org%2Ftiny/schema").json()
    properties = schema["properties"]
    assert properties["height"]["default"] == 64 and properties["height"]["multipleOf"] == 16
    assert properties["n"]["maximum"] == 10 and properties["n"]["default"] == 1
    assert properties["prompt"]["type"] == ["string", "null"] and "anyOf" not in properties["negative_prompt"]
    assert {entry["x-group"] for entry in properties.values()} == {"basic", "advanced"}
    assert "output_type" not in properties and "size" in properties
    assert_error(http.get("/v1/models/other/schema"), 404, "model")


def test_openapi_names_every_route_and_no_other(server, http):
    document = http.get("/openapi.json").json()
    told = {(method.upper(), path) for path, item in document["paths"].items() for method in item}
    routes = flat(server.server.config.loaded_app)
    there = {(method, route.path.replace(":path", "")) for route in routes for method in route.methods}
    assert told == there
    for path, one_of in {"generations": None, "edits": [{"required": ["image"]}, {"required": ["images"]}]}.items():
        body = document["paths"][f"/v1/images/{path}"]["post"]["requestBody"]["content"]["application/json"]
        assert body["schema"]["required"] == ["prompt"] and body["schema"].get("anyOf") == one_of
    for item in document["paths"].values():
        for operation in item.values():
            named = {parameter["name"] for parameter in operation["parameters"] if parameter["in"] == "path"}
            assert all(parameter["required"] for parameter in operation["parameters"] if parameter["name"] in named)


def test_no_file_and_no_host_of_a_clients_is_opened(tmp_path):
    """An audit hook sees every file that is opened and every name that is looked up, on whatever thread."""
    canary, seen, active = "canary-5f1c", [], threading.Event()

    def hook(event, arguments):
        if active.is_set() and event in ("open", "os.listdir", "socket.getaddrinfo", "socket.connect", "glob.glob"):
            seen.append((event, repr(arguments)))

    sys.addaudithook(hook)
    secret = tmp_path / f"{canary}.png"
    secret.write_bytes(png())
    with running(tmp_path / "server", IMAGE_TO_VIDEO_SCHEMA) as server, server.http() as http:
        http.get("/livez")
        active.set()
        try:
            for name in (str(secret), secret.as_uri(), f"https://{canary}.example/a.png", f"../../{secret}"):
                for field in ("image", "last_image", "input_reference", "prompt", "model", "negative_prompt", name):
                    http.post("/v1/videos", json={"prompt": "x", "image": "x", field: name})
                    files = {"prompt": (None, "x"), "image": ("a", png()), field: (name, png())}
                    http.post("/v1/videos", files=files)
                    http.post("/v1/videos", files={"prompt": (None, "x"), field: (None, name)})
                http.get(f"/v1/videos/{name}/content")
                http.get("/v1/videos", params={"after": name})
                http.get("/v1/jobs/x/content", headers={"range": name})
        finally:
            active.clear()
    assert any(event == "open" for event, _ in seen), "the hook saw nothing"
    assert not [found for found in seen if canary in found[1]]


def test_the_api_process_has_no_torch_and_is_small():
    script = (
        "import sys, importlib, pathlib, safelight.serving as serving;"
        "folder = pathlib.Path(serving.__path__[0]);"
        "[importlib.import_module(f'safelight.serving.{path.stem}') for path in folder.glob('[a-z]*.py')];"
        "heavy = {'torch', 'diffusers', 'transformers', 'av'} & set(sys.modules); assert not heavy, heavy;"
        "print(open('/proc/self/status').read().partition('VmHWM:')[2].split()[0])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert int(done.stdout) < 200 * 1024  # KiB, at its highest


def test_the_memory_of_the_api_process_is_bounded():
    """A server and its client in one process, which has no torch: bombs and junk, one after the other and together."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.serving.greedy_clients"],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
        cwd=Path(__file__).parents[2],
    )
    before, after = (int(kib) for kib in done.stdout.split())
    assert after - before < 300 * 1024, (before, after)


def test_all_bodies_together_are_bounded(tmp_path):
    """Senders that stop in the middle hold their bytes until they are late; others are told to come again."""
    head = (
        f"POST {GENERATIONS} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        "content-length: 1000000\r\n\r\n"
    )
    limits = Limits(held_bytes=2_000_000, request_seconds=6.0)
    with running(tmp_path, limits=limits) as server, contextlib.ExitStack() as stack, server.http() as http:
        for _ in range(3):
            stack.enter_context(server.connect(head.encode() + b" " * 600_000))
        server.until(lambda: server.num_connections() == 3)
        large = {"prompt": PROMPT, "user": "x" * 8000}
        end = time.monotonic() + 5
        while answer := http.post(GENERATIONS, content=json.dumps(large).encode() + b" " * 500_000, headers=JSON):
            if answer.status_code == 429:
                break
            assert time.monotonic() < end
        assert assert_error(answer, 429)["code"] == "queue_full" and answer.headers["retry-after"] == "1"
        server.until(lambda: server.num_connections() == 1)
        whole = json.dumps(large).encode() + b" " * 1_500_000  # what was held has been given back
        assert http.post(GENERATIONS, content=whole, headers=JSON).status_code == 200


def test_limits_are_the_promised_ones():
    limits = Limits()
    assert (limits.body_bytes, limits.image_bytes, limits.image_pixels) == (32 << 20, 16 << 20, 25_000_000)
    assert (limits.image_side, limits.outputs) == (8192, 10)
    assert (limits.header_seconds, limits.request_seconds, limits.stalled_seconds) == (10.0, 30.0, 60.0)
