"""Where connections come in: below a bound of descriptors, and a word to whoever is one too many."""

from __future__ import annotations

import json
import socket

import pytest

from safelight.serving.http.listening import GIVEN_AT_ONCE, MAX_CONNECTIONS, RESERVE, Listener, bound


@pytest.mark.parametrize(
    ("limit", "expected"), [(1 << 20, MAX_CONNECTIONS + RESERVE), (1024, (1024 - RESERVE) // 2), (64, 16)]
)
def test_some_descriptors_are_kept(limit, expected):
    assert bound(limit) == expected


@pytest.fixture
def listener():
    with Listener(socket.AF_INET, socket.SOCK_STREAM) as made:
        made.bind(("127.0.0.1", 0))
        made.listen(64)
        yield made


def test_a_connection_too_many_is_told_so(listener):
    listener.bound = 0
    with socket.create_connection(listener.getsockname(), 10) as client, client.makefile("rb") as file:
        listener.settimeout(0)
        with pytest.raises(BlockingIOError):
            listener.accept()
        head, _, body = file.read().partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 429 Too Many Requests\r\n") and b"\r\nretry-after: 1" in head
    assert json.loads(body)["error"]["code"] == "queue_full"


def test_others_have_their_turn(listener):
    clients = [socket.create_connection(listener.getsockname(), 10) for _ in range(GIVEN_AT_ONCE + 1)]
    given = [listener.accept()[0] for _ in range(GIVEN_AT_ONCE)]
    with pytest.raises(BlockingIOError):
        listener.accept()
    given.append(listener.accept()[0])
    for each in (*clients, *given):
        each.close()
