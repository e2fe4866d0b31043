"""Server-sent events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator
from typing import Any

import msgspec
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from safelight.serving.http.disconnects import unless_gone
from safelight.serving.http.large_json import LargeJson

_PING = b": ping\n\n"


def event(name: str, data: Any) -> bytes:
    """Return one event: its name, and its data as JSON in one line."""
    return b"event: " + name.encode("ascii") + b"\ndata: " + msgspec.json.encode(data) + b"\n\n"


def event_pieces(name: str, data: LargeJson) -> Iterator[bytes]:
    """Yield one event whose data is large."""
    yield b"event: " + name.encode("ascii") + b"\ndata: "
    yield from data.pieces()
    yield b"\n\n"


class EventStream(Response):
    """A response of events, with comments while there are none. If the client goes away, the events' source is closed.

    Args:
        source: events as bytes, or pieces of them of which the last alone ends in an empty line.
        ping_seconds: of silence, after which a comment is sent.
        on_close: called at the end, also if the source has never begun.

    """

    media_type = "text/event-stream"

    def __init__(
        self, source: AsyncGenerator[bytes, None], ping_seconds: float, on_close: Callable[[], None] = lambda: None
    ) -> None:
        self._source, self._ping_seconds, self._on_close = source, ping_seconds, on_close
        super().__init__(headers={"cache-control": "no-store", "x-accel-buffering": "no"})
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send events until they end, or the client is gone."""
        try:
            await unless_gone(receive, self._send(send))
        except ClientDisconnect:
            pass
        finally:
            self._on_close()
            await self._source.aclose()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        waiting, is_whole = asyncio.ensure_future(anext(self._source, None)), True
        try:
            while True:
                done, _ = await asyncio.wait({waiting}, timeout=self._ping_seconds if is_whole else None)
                chunk = waiting.result() if done else _PING
                if chunk is None:
                    break
                is_whole = chunk.endswith(b"\n\n")  # else it is a piece of an event, in which no comment can be
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
                if done:
                    waiting = asyncio.ensure_future(anext(self._source, None))
        finally:
            if not waiting.done():
                waiting.cancel()
                await asyncio.wait({waiting})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
