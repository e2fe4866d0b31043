"""The application as a whole: many clients, no model yet, mistakes of ours, and what its process takes."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import json
import re
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import httpx
import pytest

from safelight.runtime.client import State
from safelight.serving.limits import Limits
from tests.serving.http_server import PROMPT, assert_error, running
from tests.serving.stub_engine import IMAGE_TO_VIDEO_SCHEMA
from tests.serving.wire import (
    GENERATIONS,
    JSON,
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


def test_a_mistake_of_ours_is_a_500_without_its_insides(http, caplog):
    error = assert_error(http.post(GENERATIONS, json={"prompt": "[garbage]"}), 500)
    assert error["code"] == "internal_error" and error["type"] == "server_error"
    assert len([record for record in caplog.records if record.levelname == "ERROR"]) == 1
    told = assert_error(http.post(GENERATIONS, json={"prompt": "[fail:internal_error]"}), 500)["message"]
    assert "stub" not in told and "x-request-id" in told
    assert http.get("/livez").status_code == 200


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


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("/v1/videos", {"GET", "HEAD", "POST"}),
        ("/v1/videos/x", {"GET", "HEAD", "DELETE"}),
        ("/v1/jobs/x", {"GET", "HEAD", "DELETE"}),
        (GENERATIONS, {"POST"}),
        ("/livez", {"GET", "HEAD"}),
        ("/", {"GET", "HEAD"}),
    ],
)
def test_allow_names_every_method(server, path, allowed):
    with server.http() as http:
        for method in ("PUT", "PATCH", "OPTIONS", "TRACE", "BREW"):
            answer = http.request(method, path)
            message = assert_error(answer, 405)["message"]
            assert set(answer.headers["allow"].split(", ")) == allowed and answer.headers["allow"] in message
