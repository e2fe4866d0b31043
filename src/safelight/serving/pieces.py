"""Work over the bytes of a large body, a piece at a time: one call holds the interpreter until it returns."""

from __future__ import annotations

import base64
import codecs
import secrets
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote_to_bytes

PIECE = 1 << 20
"""Bytes whose work takes about a millisecond; between two pieces the event loop has its turn."""
_LONG = 1 << 16
"""Characters of a text that is read apart from its JSON."""
_CONTROL = bytes(range(0x20))
_BLANK = b" \t\r\n\f"


def pieces(data: bytes | bytearray, size: int = PIECE) -> Iterator[bytes]:
    """Yield copies of consecutive parts."""
    view = memoryview(data)
    return (bytes(view[at : at + size]) for at in range(0, len(data), size))


def is_blank(data: bytearray) -> bool:
    """Say whether nothing but blanks is in it."""
    return all(piece.isspace() for piece in pieces(data))


def has_more(data: bytearray, marks: tuple[bytes, ...], most: int) -> bool:
    """Say whether there are more than `most` of all the marks; no further than the first that is too many."""
    left = most
    for piece in pieces(data):
        left -= sum(piece.count(mark) for mark in marks)
        if left < 0:
            return True
    return False


def from_percent(text: str) -> bytes:
    """Return the bytes of a text with `%XX` escapes."""
    found, at = bytearray(), 0
    while at < len(text):
        end = at + PIECE
        end = next((cut for cut in (end - 2, end - 1) if text[cut : cut + 1] == "%"), end)  # no escape is cut
        found += unquote_to_bytes(text[at:end])
        at = end
    return bytes(found)


def from_base64(data: bytes) -> bytes:
    """Return what base64 holds, which may be broken into lines and lack its padding.

    Raises:
        ValueError: for anything else.

    """
    found, rest = bytearray(), b""
    for piece in pieces(data):
        text = rest + piece.translate(None, _BLANK)
        whole = (len(text) - 1) // 4 * 4  # padding is of the end alone: what may be the last four wait
        if b"=" in text[:whole]:
            raise ValueError("padding in the middle")
        found += base64.b64decode(text[:whole], validate=True)
        rest = text[whole:]
    return bytes(found + base64.b64decode(rest + b"=" * (-len(rest) % 4), validate=True))


class LongTexts:
    """The long texts of a JSON document that are written without escapes, read apart from it.

    Attributes:
        rest: the document with a short word in the place of each.
        are_there: whether there are any.

    Raises:
        UnicodeDecodeError: for what is not UTF-8.
        ValueError: for a control character in one.

    """

    def __init__(self, data: bytearray) -> None:
        self._mark, self._texts = f"{secrets.token_hex(16)}-", list[str]()
        kept, at, begun = bytearray(), 0, data.find(b'"')
        while begun >= 0:
            end = data.find(b'"', begun + 1)
            if end < 0:
                break
            escape = data.find(b"\\", begun + 1, end)
            if escape >= 0:
                end = _end_of_escaped(data, escape, end)
                if end < 0:
                    break
            elif end - begun > _LONG:
                kept += data[at : begun + 1] + f"{self._mark}{len(self._texts)}".encode()
                self._texts.append(_text(memoryview(data)[begun + 1 : end]))
                at = end
            begun = data.find(b'"', end + 1)
        self.are_there = bool(self._texts)
        self.rest = kept + data[at:] if self._texts else data

    def put_back(self, value: Any) -> Any:
        """Return a parsed value with the texts in their places, as names too."""
        if not self._texts:
            return value
        if isinstance(value, str):
            return self._texts[int(value[len(self._mark) :])] if value.startswith(self._mark) else value
        if isinstance(value, list):
            return [self.put_back(entry) for entry in value]
        if isinstance(value, dict):
            return {self.put_back(name): self.put_back(entry) for name, entry in value.items()}
        return value


def _end_of_escaped(data: bytearray, escape: int, quote: int) -> int:
    """Return where a text ends whose first escape and quote are there; -1 if it does not. One pass."""
    while escape >= 0 and quote >= 0:
        at = escape + 2  # what is escaped may be a quote
        if quote < at:
            quote = data.find(b'"', at)
        escape = data.find(b"\\", at, quote)
    return quote


def _text(view: memoryview) -> str:
    decoder, found = codecs.getincrementaldecoder("utf-8")(), []
    for begin in range(0, len(view), PIECE):
        piece = bytes(view[begin : begin + PIECE])
        if len(piece.translate(None, _CONTROL)) != len(piece):
            raise ValueError("a control character in a text")
        found.append(decoder.decode(piece))
    return "".join([*found, decoder.decode(b"", final=True)])
