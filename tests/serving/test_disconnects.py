"""What was asked for by a client who is gone is not done."""

from __future__ import annotations

import base64
import io
import threading

import pytest
from PIL import Image

from safelight.serving import context, gate
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
    begun, release = held(*{"pictures": (context, "resolve"), "bodies": (gate, "_parse_json")}[work])
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
