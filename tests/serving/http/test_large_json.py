"""Large answers: what they say, and that a slow reader holds little."""

from __future__ import annotations

import json
import os

import msgspec

from safelight.serving.http.large_json import JsonResponse, LargeJson
from safelight.serving.http.spool import Spool
from tests.serving.http_server import PROMPT, running


def test_answers_are_what_msgspec_makes_of_them(tmp_path):
    for length in (0, 1, 2, 3, 100_000, 300_001):
        store = Spool(tmp_path)
        data = os.urandom(length)
        content = {"a": 'é"', "data": [{"b64_json": store.add(data), "n": 1}, {"b64_json": store.add(b"x" + data)}]}
        whole = msgspec.json.encode({**content, "data": [{"b64_json": data, "n": 1}, {"b64_json": b"x" + data}]})
        sent = list(LargeJson(content).pieces())
        assert b"".join(sent) == whole and LargeJson(content).num_bytes == len(whole)
        assert max(map(len, sent)) <= 1 << 16
        assert JsonResponse(content).headers["content-length"] == str(len(whole))


def test_a_slow_reader_of_a_large_answer_holds_little(tmp_path):
    """Ten pictures of noise are 30 MB; what is not taken is not in memory."""
    body = json.dumps({"prompt": f"{PROMPT} [noise]", "n": 10, "size": "512x512"}).encode()
    with running(tmp_path) as server:
        head = "POST /v1/images/generations HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        with server.connect(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body) as sock:
            assert sock.recv(1000).startswith(b"HTTP/1.1 200 ")
            (connection,) = server.server.server_state.connections
            assert server.call(connection.transport.get_write_buffer_size) < 1 << 18
