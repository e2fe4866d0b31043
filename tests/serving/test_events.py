"""Server-sent events: each in its form, comments between them while there are none, and an end for their source."""

from __future__ import annotations

import asyncio
import base64

from safelight.serving.events import EventStream, event, event_pieces
from safelight.serving.http.large_json import LargeJson
from safelight.serving.http.spool import Spool


def test_an_event_is_a_name_and_one_line_of_json():
    assert event("step", {"text": "a\nb"}) == b'event: step\ndata: {"text":"a\\nb"}\n\n'


def test_a_large_event_is_the_same_in_pieces(tmp_path):
    data = bytes(range(256)) * 1000
    pieces = list(event_pieces("completed", LargeJson({"b64_json": Spool(tmp_path).add(data)})))
    assert len(pieces) > 3 and [piece.endswith(b"\n\n") for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert b"".join(pieces) == event("completed", {"b64_json": base64.b64encode(data).decode()})


def test_no_comment_is_within_an_event():
    """A disk that is slow in the middle of one is waited for."""

    async def source():
        yield b"event: a\ndata: "
        await asyncio.sleep(0.2)
        yield b"{}\n\n"
        await asyncio.sleep(0.2)
        yield b"event: b\ndata: {}\n\n"

    async def use():
        sent = []

        async def send(message):
            sent.append(message.get("body", b""))

        async def receive():
            await asyncio.sleep(10)

        await EventStream(source(), 0.05)({}, receive, send)
        return b"".join(sent)

    got = asyncio.run(use())
    assert got.startswith(b"event: a\ndata: {}\n\n: ping\n\n") and got.endswith(b"event: b\ndata: {}\n\n")


def test_a_client_that_goes_away_closes_the_source_of_its_events():
    """Also one that has not begun yet."""
    ended: list[str] = []

    async def source():
        try:
            yield b"event: a\ndata: {}\n\n"
            await asyncio.sleep(10)
        finally:
            ended.append("source")

    async def use(leaves_at_once: bool):
        gone = asyncio.Event()

        async def send(message):
            if message.get("body") or leaves_at_once:
                gone.set()
                await asyncio.sleep(0)

        async def receive():
            await gone.wait()
            return {"type": "http.disconnect"}

        async with asyncio.timeout(5):
            await EventStream(source(), 0.05, lambda: ended.append("closed"))({}, receive, send)

    asyncio.run(use(False))
    assert sorted(ended) == ["closed", "source"]
    asyncio.run(use(True))
    assert ended.count("closed") == 2
