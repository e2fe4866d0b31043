"""The long texts of a JSON body, which stay in the body's file: parsing costs memory for all the rest alone."""

from __future__ import annotations

import secrets
from typing import Any

from safelight.serving.http.pieces import CONTROL, check_utf8, find, has_slashes_alone, pieces, turn, with_slashes
from safelight.serving.http.spool import LongText, Spool

_LONG = 1 << 16
"""Bytes of a text that is left where it is. No field takes as many, but for a picture's data URL."""
_NAME_LENGTH = 1000
"""Characters that are kept of a long name, which is no field's."""
_AT_ONCE = 500
"""Texts and escapes that are looked at before the event loop has its turn."""


class LongTexts:
    r"""The long texts of a JSON document that are written without escapes but `\/`, as PHP does, left out of it.

    Args:
        data: the document.
        spool: where it is as well.

    Attributes:
        rest: the document with a short word in the place of each.
        are_there: whether there are any.

    Raises:
        UnicodeError: for what is not UTF-8 in one.
        ValueError: for a control character in one.

    """

    def __init__(self, data: bytearray, spool: Spool) -> None:
        self._mark, self._texts = f"{secrets.token_hex(16)}-", list[LongText]()
        self._steps = 0
        kept, at, begun = bytearray(), 0, find(data, b'"', 0) if len(data) > _LONG else -1
        while begun >= 0:
            self._step()
            end = find(data, b'"', begun + 1)
            if end < 0:
                break
            escape = find(data, b"\\", begun + 1, end)
            if escape >= 0:
                end = self._end_of_escaped(data, escape, end)
                if end < 0:
                    break
            if end - begun > _LONG and (text := _text(data, begun + 1, end, escape >= 0, spool)) is not None:
                kept += data[at : begun + 1] + f"{self._mark}{len(self._texts)}".encode()
                self._texts.append(text)
                at = end
            begun = find(data, b'"', end + 1)
        self.are_there = bool(self._texts)
        self.rest = kept + data[at:] if self._texts else data

    def _step(self) -> None:
        self._steps += 1
        if self._steps % _AT_ONCE == 0:
            turn()

    def _end_of_escaped(self, data: bytearray, escape: int, quote: int) -> int:
        """Return where a text ends whose first escape and quote are there; -1 if it does not. One pass."""
        while escape >= 0 and quote >= 0:
            self._step()
            at = escape + 2  # what is escaped may be a quote
            if quote < at:
                quote = find(data, b'"', at)
            escape = find(data, b"\\", at, quote)
        return quote

    def put_back(self, value: Any) -> Any:
        """Return a parsed value with the texts in their places; of one that is a name, its beginning."""
        if not self._texts:
            return value
        if isinstance(value, str):
            return self._texts[int(value[len(self._mark) :])] if value.startswith(self._mark) else value
        if isinstance(value, list):
            return [self.put_back(entry) for entry in value]
        if isinstance(value, dict):
            return {self._name(name): self.put_back(entry) for name, entry in value.items()}
        return value

    def _name(self, name: str) -> str:
        text = self.put_back(name)
        return text.start[:_NAME_LENGTH] if isinstance(text, LongText) else name


def _text(data: bytearray, begin: int, end: int, is_escaped: bool, spool: Spool) -> LongText | None:
    """Return a long text as it is in the document's file, or added to that; None for one with other escapes."""
    written = memoryview(data)[begin:end]
    if is_escaped and not has_slashes_alone(pieces(written)):
        return None
    check_utf8(pieces(written), CONTROL)
    if not is_escaped:
        return LongText(spool, begin, end - begin)
    stored = spool.store(with_slashes(pieces(written)))
    return LongText(spool, stored.begin, stored.length)
