"""What was asked for by a client who is gone is not done."""

from __future__ import annotations

import base64
import gc
import io
import json
import threading
import weakref

import pytest
from PIL import Image

from safelight.serving import trial
from safelight.serving.http import bodies, spool
from tests.serving.http_server import PROMPT, running
from tests.serving.stub_engine import EDIT_SCHEMA

NUM_LEAVING = 6


@pytest.fixture
def held(monkeypatch):
    """Hold up the one thread of a kind of work, and count what it is given."""

    def hold(module, name):
        real, begun, release = getattr(module, name), list[int](), threading.Event()

        def wait(*args):
            begun.append(1)
            assert release.wait(60)
            return real(*args)

        monkeypatch.setattr(module, name, wait)
        return begun, release

    return hold


@pytest.mark.parametrize("prefer", ["", "prefer: respond-async\r\n"])
@pytest.mark.parametrize("work", ["pictures", "bodies"])
def test_work_that_waits_its_turn_is_dropped_when_its_client_leaves(tmp_path, held, work, prefer):
    """Pictures are tried, and bodies looked at, one after another: those of clients who are gone held up all others."""
    file = io.BytesIO()
    Image.new("RGB", (64, 64)).save(file, "PNG")
    begun, release = held(*{"pictures": (trial, "check_all"), "bodies": (bodies, "parse_json")}[work])
    body = b'{"prompt": "%s", "image": "data:image/png;base64,%s"%s}' % (
        PROMPT.encode(),
        base64.b64encode(file.getvalue()),
        b" " * (6000 if work == "bodies" else 0),
    )
    head = f"POST /v1/images/edits HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n{prefer}"
    data = f"{head}content-length: {len(body)}\r\n\r\n".encode() + body
    with running(tmp_path, EDIT_SCHEMA) as server:
        with server.connect(data):
            server.until(lambda: len(begun) == 1)
            leaving = [server.connect(data) for _ in range(NUM_LEAVING)]
            server.until(lambda: server.num_connections() == 1 + NUM_LEAVING)
            for sock in leaving:
                sock.close()
            server.until(lambda: server.num_connections() == 1)
            release.set()
            server.until(lambda: len(server.engine.submitted) == 1)
        with server.http() as http:
            assert http.post("/v1/images/edits", content=body, headers={"content-type": "application/json"}).is_success
        assert len(begun) == 2


def faults():
    """Yield requests that are refused late, each with a body that has a file: (route, content type, body)."""
    file = io.BytesIO()
    Image.new("RGB", (64, 64)).save(file, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    damaged = f"data:image/png;base64,{base64.b64encode(file.getvalue()[:80] + bytes(50)).decode()}"
    long = "x" * 100_000
    fields = {
        "no JSON": f'{{"prompt": "{long}',
        "a name that is too long": json.dumps({long: 1}),
        "an unknown field": json.dumps({"prompt": PROMPT, "image": url, "what": long}),
        "a long prompt": json.dumps({"prompt": long, "image": url}),
        "no picture": json.dumps({"prompt": PROMPT, "image": long}),
        "no base64": json.dumps({"prompt": PROMPT, "image": f"data:image/png;base64,{long}!"}),
        "a damaged picture": json.dumps({"prompt": PROMPT, "image": damaged, "user": "x" * 70_000}),
        "too many pictures": json.dumps({"prompt": PROMPT, "image": [url] * 400}),
        "a size that is none": json.dumps({"prompt": PROMPT, "image": url, "size": "7x7", "user": "x" * 70_000}),
        "steps that are none": json.dumps({"prompt": PROMPT, "image": url, "num_inference_steps": 0, "user": long}),
        "none": json.dumps({"prompt": PROMPT, "image": url, "user": "x" * 70_000}),
    }
    for name, body in fields.items():
        yield pytest.param("application/json", body.encode(), id=name)
    part = b'--b\r\ncontent-disposition: form-data; name="%s"\r\n\r\n%s\r\n'
    form = "multipart/form-data; boundary=b"
    for name in ("prompt", "what", "image"):
        yield pytest.param(form, part % (name.encode(), long.encode()) + b"--b--\r\n", id=f"a form: {name}")
    yield pytest.param(form, part % (b"a", long.encode()), id="a form without an end")


@pytest.mark.parametrize("prefer", ["", "respond-async"])
@pytest.mark.parametrize(("kind", "body"), faults())
def test_what_has_been_answered_holds_no_file(tmp_path, monkeypatch, kind, body, prefer):
    """Not until Python's collector comes, which in a server that has little to do is a long time."""
    made = []
    real = spool.Spool.__init__

    def noted(self, *args):
        real(self, *args)
        made.append(weakref.ref(self))

    monkeypatch.setattr(spool.Spool, "__init__", noted)
    with running(tmp_path, EDIT_SCHEMA) as server:
        gc.collect()
        gc.disable()
        try:
            with server.http() as http:
                headers = {"content-type": kind} | ({"prefer": prefer} if prefer else {})
                answer = http.post("/v1/images/edits", content=body, headers=headers)
                assert answer.status_code in (200, 202, 400, 413), answer.text
                if answer.status_code == 202:
                    path = f"/v1/jobs/{answer.json()['id']}"
                    server.until(lambda: http.get(path).json()["state"] == "completed")
            server.until(lambda: not any(ref() for ref in made), 10)
        finally:
            gc.enable()
        assert made
