"""Work over the bytes of a large body, a piece at a time: one call holds the interpreter until it returns."""

from __future__ import annotations

import base64
import codecs
import time
from collections.abc import Iterable, Iterator
from urllib.parse import unquote_to_bytes

PIECE = 1 << 18
"""Bytes whose work takes about a quarter of a millisecond; after each piece the event loop has its turn."""
ESCAPED_PIECE = 1 << 14
"""Bytes with `%XX` escapes, each of which is a string of its own on its way."""
_TURN_SECONDS = 0.0002
"""A thread that only lets the interpreter go takes it again before the event loop has woken."""
CONTROL = bytes(range(0x20))
_BLANK = b" \t\r\n\f"
_SLASH = b"\\/"
"""A slash as some writers escape it."""


def turn() -> None:
    """Let the event loop have its turn, between two pieces of work in a thread."""
    time.sleep(_TURN_SECONDS)


def pieces(data: bytes | bytearray | memoryview, size: int = PIECE) -> Iterator[bytes]:
    """Yield copies of consecutive parts, with a turn for the event loop after each."""
    view = memoryview(data)
    for at in range(0, len(view), size):
        if at:
            turn()
        yield bytes(view[at : at + size])


def has_more(data: bytearray, most: int) -> bool:
    """Say whether JSON has more than `most` items and escapes; no further than the first that is too many.

    Of escaped slashes, of which some writers' base64 is full, ten are one.
    """
    left = 10 * most
    for piece in pieces(data):
        left -= 10 * sum(piece.count(mark) for mark in (b"[", b"{", b",", b"\\")) - 9 * piece.count(_SLASH)
        if left < 0:
            return True
    return False


def find(data: bytearray, mark: bytes, begin: int, end: int | None = None) -> int:
    """Return where a byte is first, as `bytearray.find` does."""
    end = len(data) if end is None else end
    for at in range(begin, end, PIECE):
        found = data.find(mark, at, min(at + PIECE, end))
        if found >= 0:
            return found
        if at + PIECE < end:
            turn()
    return -1


class ControlError(ValueError):
    """A text in JSON has a control character, which is written as an escape there."""


def check_utf8(parts: Iterable[bytes], without: bytes = b"") -> None:
    """Refuse parts of a text that are not UTF-8 together, or hold some bytes.

    Raises:
        UnicodeDecodeError: for what is not UTF-8.
        ControlError: for one of those bytes.

    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    for piece in parts:
        decoder.decode(piece)
        if without and len(piece.translate(None, without)) != len(piece):
            raise ControlError("a control character in a text")
    decoder.decode(b"", final=True)


def has_slashes_alone(parts: Iterable[bytes]) -> bool:
    """Say whether every escape of a JSON text is a slash's, which needs none."""
    return all(part.count(b"\\") == part.count(_SLASH) for part in _whole_slashes(parts))


def with_slashes(parts: Iterable[bytes]) -> Iterator[bytes]:
    """Yield a text whose every escape is a slash's without those."""
    for part in _whole_slashes(parts):
        yield part.replace(_SLASH, b"/")


def _whole_slashes(parts: Iterable[bytes]) -> Iterator[bytes]:
    """Yield parts that end in no backslash, but perhaps the last one."""
    rest = b""
    for part in parts:
        data = rest + part
        whole = len(data) - data.endswith(b"\\")
        yield data[:whole]
        rest = data[whole:]
    yield rest


def from_percent(parts: Iterable[bytes]) -> Iterator[bytes]:
    """Yield the bytes of a text with `%XX` escapes, whose parts may cut an escape."""
    rest = b""
    for part in parts:
        for piece in pieces(part, ESCAPED_PIECE if b"%" in part else PIECE):
            data = rest + piece
            cut = next((at for at in (len(data) - 2, len(data) - 1) if data[at : at + 1] == b"%"), len(data))
            yield unquote_to_bytes(data[:cut])
            rest = data[cut:]
    yield unquote_to_bytes(rest)


def from_base64(parts: Iterable[bytes]) -> Iterator[bytes]:
    """Yield what base64 holds, which may be broken into lines and lack its padding.

    Raises:
        ValueError: for anything else.

    """
    rest = b""
    for part in parts:
        text = rest + part.translate(None, _BLANK)
        whole = (len(text) - 1) // 4 * 4  # padding is of the end alone: what may be the last four wait
        if b"=" in text[:whole]:
            raise ValueError("padding in the middle")
        yield base64.b64decode(text[:whole], validate=True)
        rest = text[whole:]
    yield base64.b64decode(rest + b"=" * (-len(rest) % 4), validate=True)


def to_base64(parts: Iterable[bytes]) -> Iterator[bytes]:
    """Yield base64, without line ends."""
    rest = b""
    for part in parts:
        data = rest + part
        whole = len(data) // 3 * 3
        yield base64.b64encode(data[:whole])
        rest = data[whole:]
    yield base64.b64encode(rest)
