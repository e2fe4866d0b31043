"""JSON that holds pictures in base64: written and sent a piece at a time, its pictures on disk. Imports no torch.

Ten pictures of a megapixel are 40 MB of JSON. Whoever reads it slowly holds none of that in memory.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from safelight.serving.http.pieces import to_base64
from safelight.serving.http.spool import Stored

_PIECE = 3 << 14
"""Bytes of a picture that become one piece of an answer: a multiple of three."""


class LargeJson:
    """JSON in which stored bytes are base64.

    Args:
        content: what msgspec can write, and `Stored`.

    Attributes:
        num_bytes: its length.

    """

    def __init__(self, content: Any) -> None:
        mark, self._files = secrets.token_hex(16).encode(), list[Stored]()

        def placed(value: Any) -> str:
            if not isinstance(value, Stored):
                raise TypeError(f"{type(value)} is not of JSON")
            self._files.append(value)
            return mark.decode()

        self._texts = msgspec.json.encode(content, enc_hook=placed).split(mark)
        self.num_bytes = sum(map(len, self._texts)) + sum(-(-len(file) // 3) * 4 for file in self._files)

    def pieces(self) -> Iterator[bytes]:
        """Yield it. This may wait for the disk."""
        for number, text in enumerate(self._texts):
            yield text
            if number < len(self._files):
                yield from to_base64(self._files[number].pieces(size=_PIECE))


async def in_thread(pieces: Iterator[bytes]) -> AsyncIterator[bytes]:
    """Yield pieces, each of which is made in a thread."""
    while (piece := await asyncio.to_thread(next, pieces, None)) is not None:
        yield piece


class JsonResponse(Response):
    """An answer of large JSON. What its reader does not take waits on disk."""

    media_type = "application/json"

    def __init__(self, content: Mapping[str, Any]) -> None:
        self._json = LargeJson(content)
        super().__init__()
        self.headers["content-length"] = str(self._json.num_bytes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it, as fast as its reader takes it."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for piece in in_thread(self._json.pieces()):
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
