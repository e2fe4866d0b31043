"""A multipart form, parsed strictly and a piece at a time: what is long in it stays in the body's file."""

from __future__ import annotations

import contextlib
import itertools
import re
from dataclasses import dataclass, field
from typing import Any

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from safelight.serving.http.errors import MalformedRequestError
from safelight.serving.http.pieces import check_utf8
from safelight.serving.http.spool import IN_MEMORY, LongText, Spool, Stored
from safelight.serving.limits import Limits

CHARSETS = (b"utf-8", b"utf8", b"us-ascii")
_PIECE = 1 << 16
"""Bytes that the parser is given at once: it is Python, and looks at some of them one by one."""
_PLAIN_CODINGS = (b"7bit", b"8bit", b"binary")
_MAX_NESTING = 4
_PART_HEADER_BYTES = 8192
"""Of all headers of a part: its name, a file's name and a type."""
_NAME_LENGTH = 512
_NAME = re.compile(r"([^\[\]\x00]{1,100})((?:\[[^\[\]\x00]{0,100}\])*)")


@dataclass(frozen=True)
class Upload:
    """Bytes in a form: a file, or what is no text. Their name and their type are the client's words, and are not kept.

    Attributes:
        data: the bytes, or where they are.
        described: what a message says of them; it never holds them.

    """

    data: bytes | Stored
    described: str = "a file"

    def __repr__(self) -> str:
        """Say what it is, in a message too."""
        return f"{self.described} of {len(self.data)} bytes"


class Repeated(list[Any]):
    """The values of parts that have one name; whether it may have several is for the field to say."""


def about(name: str, problem: str) -> MalformedRequestError:
    """Return the error that says what is wrong with a field or part, whatever its name is."""
    shown = name[:100].encode("utf-8", "backslashreplace").decode()  # it may be half of a surrogate pair
    return MalformedRequestError.rebuilt(f"{shown}: {problem}", shown)


@dataclass
class _Part:
    """One part of a form, as the parser finds it; names of headers are in lower case.

    Attributes:
        headers: its headers.
        content: its bytes, as long as they are few.
        length: their number.
        end: where they end in the body, as far as that is known.

    """

    headers: dict[bytes, bytes] = field(default_factory=dict)
    content: bytearray = field(default_factory=bytearray)
    length: int = 0
    end: int = 0

    def data(self, spool: Spool) -> bytes | Stored:
        """Return its bytes, or where they are in the body."""
        if self.length <= IN_MEMORY:
            return bytes(self.content)
        return Stored(spool, self.end - self.length, self.length)


class _Parts:
    """Collect the parts of a form."""

    def __init__(self, limits: Limits) -> None:
        self.found: list[_Part] = []
        self.is_complete = False
        self._limits = limits
        self._name, self._value = bytearray(), bytearray()
        self._num_header_bytes = 0
        self._piece, self._at = b"", 0

    def parse(self, body: Stored, boundary: bytes) -> None:
        """Give a parser the body, piece by piece."""
        parser = MultipartParser(boundary, self._callbacks())  # type: ignore[arg-type]  # its keys are these
        for piece in body.pieces(size=_PIECE):
            self._piece = piece
            parser.write(piece)
            self._at += len(piece)

    def _callbacks(self) -> dict[str, Any]:
        return {
            "on_part_begin": self._begin,
            "on_part_data": self._content,
            "on_header_field": lambda data, start, end: self._extend(self._name, data[start:end]),
            "on_header_value": lambda data, start, end: self._extend(self._value, data[start:end]),
            "on_header_end": self._header,
            "on_end": self._end,
        }

    def _begin(self) -> None:
        if len(self.found) >= self._limits.parts:
            raise MalformedRequestError(f"the form has more than {self._limits.parts} parts")
        self.found.append(_Part())
        self._num_header_bytes = 0

    def _content(self, data: bytes, start: int, end: int) -> None:
        """Take in a piece of a part; what looked like a boundary, and lies across two pieces, comes from elsewhere."""
        part = self.found[-1]
        part.length += end - start
        part.end = self._at + end if data is self._piece else part.end + end - start
        if part.length <= IN_MEMORY:
            part.content += data[start:end]
        else:
            part.content.clear()

    def _extend(self, place: bytearray, data: bytes) -> None:
        """Take in a piece of a header, before anything looks at the whole."""
        self._num_header_bytes += len(data)
        if self._num_header_bytes > _PART_HEADER_BYTES:
            raise MalformedRequestError(f"a part's headers have more than {_PART_HEADER_BYTES} bytes")
        place.extend(data)

    def _header(self) -> None:
        self.found[-1].headers[bytes(self._name).lower()] = bytes(self._value)
        self._name, self._value = bytearray(), bytearray()

    def _end(self) -> None:
        self.is_complete = True


def parse_form(spool: Spool, limits: Limits, boundary: bytes) -> tuple[dict[str, Any], tuple[bytes | Stored, ...]]:
    """Return a form's fields, and its files in their order. Every scalar is text, a `LongText` or an `Upload`.

    Raises:
        MalformedRequestError: for what is no form, or has parts that are not taken.

    """
    parts = _Parts(limits)
    try:
        if not boundary:
            raise MalformedRequestError("the form's content-type has no boundary")
        parts.parse(spool.all(), boundary)
    except FormParserError as error:
        raise MalformedRequestError("the body is no multipart form with that boundary") from error
    if not parts.is_complete:
        raise MalformedRequestError("the form ends before its last boundary")
    fields: dict[str, Any] = {}
    files = []
    for part in parts.found:
        options = parse_options_header(part.headers.get(b"content-disposition"))[1]
        name = options.get(b"name", b"").decode("utf-8", "replace")
        value = _value(name, part, spool, is_file=b"filename" in options)
        if isinstance(value, Upload):
            if not len(value.data) and not options.get(b"filename"):
                continue  # a browser's input for a file, in which none was chosen
            files.append(value.data)
        _insert(fields, name, value)
    return fields, tuple(files)


def _value(name: str, part: _Part, spool: Spool, is_file: bool) -> Upload | LongText | str:
    """Return a part's text, or its bytes where it is a file or no text: a file need not have a name (RFC 7578, 4.2)."""
    media_type, options = parse_options_header(part.headers.get(b"content-type"))
    coding = part.headers.get(b"content-transfer-encoding", b"binary").strip().lower()
    if coding not in _PLAIN_CODINGS:
        raise about(name, "a part is taken as it is, without a content-transfer-encoding")
    if media_type.startswith(b"multipart/"):
        raise about(name, "several files are several parts, each named image[]")
    if is_file or not (media_type in (b"", b"application/json") or media_type.startswith(b"text/")):
        return Upload(part.data(spool))
    if options.get(b"charset", b"utf-8").lower() not in CHARSETS:
        raise about(name, "text is taken as UTF-8 alone")
    data = part.data(spool)
    with contextlib.suppress(UnicodeDecodeError):
        if isinstance(data, bytes):
            return data.decode()
        check_utf8(data.pieces())
        return LongText(spool, data.begin, data.length)
    return Upload(data, "bytes that are no UTF-8 text,")


def _insert(fields: dict[str, Any], name: str, value: Upload | LongText | str) -> None:
    """Put a part in its place: `a`, `a[]` for a list, `a[b]` for an object, `a[][b]` for a list of objects."""
    match = _NAME.fullmatch(name) if len(name) <= _NAME_LENGTH else None
    keys = [] if match is None else [match[1], *re.findall(r"\[([^\]]*)\]", match[2])]
    if not 1 <= len(keys) <= _MAX_NESTING:
        raise about(name, "a part's name is a field, with at most three brackets")
    place: Any = fields
    for key, following in itertools.pairwise(keys):
        empty: list[Any] | dict[str, Any] = [] if following == "" else {}
        if key != "":
            place = _expect(place, dict, keys[0]).setdefault(key, empty)
        else:
            entries = _expect(place, list, keys[0])
            if following == "" or not entries or not isinstance(entries[-1], dict) or following in entries[-1]:
                entries.append(empty)
            place = entries[-1]
    _put(place, keys[-1], value, keys[0])


def _put(place: Any, key: str, value: Upload | LongText | str, name: str) -> None:
    if key == "":
        _expect(place, list, name).append(value)
    elif key not in _expect(place, dict, name):
        place[key] = value
    elif isinstance(place[key], Repeated):
        place[key].append(value)
    else:
        place[key] = Repeated([_expect(place[key], Upload | LongText | str, name), value])


def _expect(place: Any, kind: Any, name: str) -> Any:
    if not isinstance(place, kind):
        raise about(name, "is given in two forms")
    return place
