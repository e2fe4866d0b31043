"""What large bodies, pictures and answers cost the API process: no long hold of the interpreter, and no memory."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import gc
import json
import os
import random
import threading
import time
import tracemalloc
from collections.abc import Callable

import pytest
from python_multipart.multipart import parse_options_header
from starlette.requests import Request

from safelight.errors import SafelightError
from safelight.serving.context import Settings
from safelight.serving.fields import sort_fields
from safelight.serving.http import bodies, long_texts, pieces, spool
from safelight.serving.http.bodies import Body, read_body
from safelight.serving.http.forms import parse_form
from safelight.serving.http.held_bytes import HeldBytes
from safelight.serving.http.json_body import parse_json
from safelight.serving.http.spool import IN_MEMORY, Spool
from safelight.serving.limits import Limits
from tests.serving.greedy_clients import chunk, picture_of
from tests.serving.http_server import PROMPT, running
from tests.serving.large_bodies import KINDS
from tests.serving.stub_engine import EDIT_SCHEMA

LIMITS = Limits()
QUICK = (
    "one text",
    "one text with one wide letter",
    "texts with one wide letter",
    "a field's name",
    "a picture",
    "a text in a form",
    "a file in a form",
    "hyphens in a form",
)
SLOW = [kind for kind in KINDS if kind not in QUICK and not kind.startswith(("nothing", "25 mega", "ten large"))]


def body_of(found, limits, media_type):
    boundary = parse_options_header(media_type)[1].get(b"boundary")
    fields, files = parse_json(found, limits) if boundary is None else parse_form(found, limits, boundary)
    return Body(found, boundary is not None, True, fields, files)


@pytest.mark.parametrize("kind", [*QUICK, *(pytest.param(kind, marks=pytest.mark.slow) for kind in SLOW)])
def test_a_large_body_is_looked_at_in_small_pieces(kind, monkeypatch, tmp_path):
    """Between two turns of the event loop there is little work, by the thread's own clock, and memory for one body."""
    media_type, body = KINDS[kind]()
    longest, last = 0.0, 0.0

    def spooled():
        found = Spool(tmp_path)
        found.keep(body)
        found.flush()
        return found

    def turn():
        nonlocal longest, last
        longest, last = max(longest, time.thread_time() - last), time.thread_time()

    for module in (pieces, spool, long_texts):
        monkeypatch.setattr(module, "turn", turn)

    def look(found):
        with contextlib.suppress(SafelightError):
            parsed = body_of(found, LIMITS, media_type)
            tracemalloc.reset_peak()
            sort_fields(parsed, EDIT_SCHEMA, LIMITS)

    gc.collect()
    found, last = spooled(), time.thread_time()
    look(found)
    turn()
    assert longest < 0.4, "of 28 MB at once"
    found = spooled()
    gc.collect()
    tracemalloc.start()
    look(found)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < len(body) + (50 << 20)


@pytest.mark.parametrize("kind", ["a picture", "pictures in JSON"])
def test_pictures_stay_on_disk(kind, monkeypatch, tmp_path):
    media_type, body = KINDS[kind]()
    found = Spool(tmp_path)
    found.keep(body)
    found.flush()
    limits = Limits(image_bytes=32 << 20)
    parsed = body_of(found, limits, media_type)
    del body
    gc.collect()
    tracemalloc.start()
    asked = sort_fields(parsed, EDIT_SCHEMA, limits)
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert sum(len(file) for files in asked.pictures.values() for file in files) > 6_000_000
    assert held < 1 << 20 and peak < 8 << 20


def request_of(chunks):
    """Return a request whose body comes in chunks."""

    async def receive():
        return {"type": "http.request", "body": left.pop(0), "more_body": bool(left)}

    left = list(chunks)
    return Request({"type": "http", "method": "POST", "path": "/", "headers": [], "state": {"at_end": Ends()}}, receive)


class Ends(list[Callable[[], None]]):
    def callback(self, function, *args):
        self.append(lambda: function(*args))


@pytest.mark.parametrize("sizes", [[10], [IN_MEMORY], [IN_MEMORY, 1], [1, IN_MEMORY], [70_000] * 40, [1] * 900 + [9]])
@pytest.mark.parametrize("memory", [0, 100_000, 32 << 20])
def test_what_is_received_is_counted_and_given_back(sizes, memory, tmp_path):
    chunks = [os.urandom(size) for size in sizes]
    limits = Limits(memory_bytes=memory)
    held = HeldBytes(limits, tmp_path)
    request = request_of(chunks)
    got = asyncio.run(read_body(request, limits, held))
    assert got.all().read() == b"".join(chunks) == b"".join(got.all().pieces(size=1000))
    assert got.in_file == (sum(sizes) > IN_MEMORY or sum(sizes) > memory)
    assert held.num_bytes == sum(sizes)
    assert held.in_memory == (0 if got.in_file else sum(sizes))
    for end in request.scope["state"]["at_end"]:
        end()
    assert (held.num_bytes, held.in_memory) == (0, 0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("num_bytes", "aside"), [(4000, False), (5000, True), (60_000, True), (70_000, True)])
@pytest.mark.parametrize("is_form", [False, True])
def test_what_takes_more_than_a_moment_is_not_looked_at_in_the_event_loops_thread(
    num_bytes, aside, is_form, monkeypatch, tmp_path
):
    """Sixteen bodies of 64 KB that are all fields, at once, were a tenth of a second for everybody else."""
    name = "parse_form" if is_form else "parse_json"
    parse, threads = getattr(bodies, name), list[threading.Thread]()

    def noted(*args, **kwargs):
        threads.append(threading.current_thread())
        return parse(*args, **kwargs)

    monkeypatch.setattr(bodies, name, noted)
    with running(tmp_path) as server, server.http() as http:
        fields = {"prompt": PROMPT, "user": "x" * (num_bytes - 300)}
        files = {"seed": (None, "1")} if is_form else None
        route = "/v1/images/edits" if is_form else "/v1/images/generations"
        http.post(route, **({"data": fields, "files": files} if is_form else {"json": fields}))
        (thread,) = threads
        assert (thread.name == "server") is not aside


def test_bodies_that_wait_are_in_memory_as_far_as_there_is_room(tmp_path):
    async def use():
        limits = Limits(memory_bytes=1 << 20)
        held = HeldBytes(limits, tmp_path)
        got = [await read_body(request_of([b"x" * 60_000]), limits, held) for _ in range(50)]
        assert sum(len(body._data) for body in got) <= 1 << 20 and held.num_bytes == 3_000_000

    asyncio.run(use())


def test_legal_bodies_of_the_largest_size_pass(tmp_path):
    """A picture of nearly 16 MiB in a form and in JSON, of a body of at most 32 MiB."""
    small = picture_of(64, 64)
    padded = small[:33] + chunk(b"prVt", random.Random(0).randbytes(15 << 20)) + small[33:]
    url = "data:image/png;base64," + base64.b64encode(padded).decode()
    with running(tmp_path, EDIT_SCHEMA) as server, server.http() as http:
        files = {"image": ("a", padded, "image/png")}
        form = http.post("/v1/images/edits", data={"prompt": PROMPT, "seed": "1"}, files=files)
        for fields in ({"image": url}, {"images": [{"image_url": url}]}):
            sent = http.post("/v1/images/edits", json={"prompt": PROMPT, "seed": 1, **fields})
            assert sent.status_code == form.status_code == 200, (sent.text, form.text)
            assert sent.json()["data"] == form.json()["data"]
        written = json.dumps({"prompt": PROMPT, "seed": 1, "image": url}).replace("/", "\\/")  # as PHP writes it
        sent = http.post("/v1/images/edits", content=written, headers={"content-type": "application/json"})
        assert sent.status_code == 200 and sent.json()["data"] == form.json()["data"]
        (first, *_) = server.engine.submitted
        assert [image.file for image in first.params.image or ()] == [padded]


def test_settings_are_the_promised_ones():
    assert Settings(("a",)).limits.memory_bytes + 2 * LIMITS.body_bytes + 4 * LIMITS.json_bytes < 200 << 20
