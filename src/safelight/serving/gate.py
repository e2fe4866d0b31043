"""A request's body, read within its bounds and parsed strictly: JSON or a multipart form."""

from __future__ import annotations

import asyncio
import functools
import itertools
import json
import math
import re
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from decimal import Decimal
from typing import Any, NoReturn, ParamSpec, TypeVar

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request

from safelight.errors import QueueFullError
from safelight.serving.errors import MalformedRequestError, MediaTypeError, TimedOutError, TooLargeError
from safelight.serving.limits import Limits
from safelight.serving.pieces import LongTexts, has_more, is_blank

P = ParamSpec("P")
T = TypeVar("T")

_SMALL_BODY = 1 << 16
"""Bytes that are parsed at once; more are parsed in a thread, so that the event loop goes on."""
_LARGE_BODIES = ThreadPoolExecutor(1, thread_name_prefix="safelight-bodies")
"""They are looked at one after another: threads take the interpreter from each other, and most from the event loop."""
_NUMBER_LENGTH = 400
_INTEGER_LENGTH = 40
_MAX_NESTING = 4
_CHARSETS = (b"utf-8", b"utf8", b"us-ascii")
_PLAIN_CODINGS = (b"7bit", b"8bit", b"binary")
_KEPT_PART = 8
_MEDIA_TYPE_LENGTH = 1000
_PART_HEADER_BYTES = 8192
"""Of all headers of a part: its name, a file's name and a type."""
_NAME_LENGTH = 512
_NAME = re.compile(r"([^\[\]\x00]{1,100})((?:\[[^\[\]\x00]{0,100}\])*)")


@dataclass(frozen=True)
class Upload:
    """Bytes in a form: a file, or what is no text. Their name and their type are the client's words, and are not kept.

    Attributes:
        data: the bytes.
        described: what a message says of them; it never holds them.

    """

    data: bytes
    described: str = "a file"

    def __repr__(self) -> str:
        """Say what it is, in a message too."""
        return f"{self.described} of {len(self.data)} bytes"


class Repeated(list[Any]):
    """The values of parts that have one name; whether it may have several is for the field to say."""


@dataclass(frozen=True)
class Body:
    """What a client sent.

    Attributes:
        fields: by name; from a form, every scalar is text or an `Upload`.
        is_form: whether it was a form.
        files: the files of a form, in their order.
        is_large: whether looking at its fields may take a while, so that it is for a thread.

    """

    fields: Mapping[str, Any]
    is_form: bool
    files: tuple[bytes, ...] = ()
    is_large: bool = False


class Budget:
    """Bytes that all requests under way hold together."""

    def __init__(self, most: int) -> None:
        self._most, self._held = most, 0

    def take(self, request: Request, num_bytes: int, is_small: bool = False) -> None:
        """Count bytes until the request has been answered. The last eighth is for what is small.

        Raises:
            QueueFullError: if others hold so many that these are too many.

        """
        if self._held + num_bytes > (self._most if is_small else self._most - self._most // _KEPT_PART):
            raise QueueFullError("too much is being received and decoded at once; try again later")
        self._held += num_bytes
        request.scope["state"]["at_end"].callback(self._give_back, num_bytes)

    def _give_back(self, num_bytes: int) -> None:
        self._held -= num_bytes


async def read_fields(request: Request, limits: Limits, budget: Budget, forms: bool) -> Body:
    """Read and parse a request's body.

    Args:
        request: whose body has not been read.
        limits: the bounds.
        budget: what its bytes count against.
        forms: whether a multipart form is taken as well as JSON.

    Raises:
        MediaTypeError, TooLargeError, MalformedRequestError: for what is not taken.

    """
    described = request.headers.get("content-type", "")
    if len(described) > _MEDIA_TYPE_LENGTH:
        raise MalformedRequestError(f"content-type: at most {_MEDIA_TYPE_LENGTH} characters are taken")
    media_type, options = parse_options_header(described)
    is_form = forms and media_type == b"multipart/form-data"
    if not is_form and media_type != b"application/json":
        takes = "application/json or multipart/form-data" if forms else "application/json"
        raise MediaTypeError(f"content-type: this route takes {takes}")
    if options.get(b"charset", b"utf-8").lower() not in _CHARSETS:
        raise MediaTypeError("content-type: text is taken as UTF-8 alone")
    data = await read_body(request, limits, budget)
    parse, arguments = (_parse_form, (options.get(b"boundary", b""),)) if is_form else (_parse_json, ())
    if len(data) <= _SMALL_BODY:
        return parse(data, limits, *arguments)
    return replace(await _in_turn(parse, data, limits, *arguments), is_large=True)


async def aside(body: Body, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call what looks at all of a body: in a thread where that is large, so that the event loop goes on."""
    return await _in_turn(function, *args, **kwargs) if body.is_large else function(*args, **kwargs)


async def _in_turn(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    call = functools.partial(function, *args, **kwargs)
    return await asyncio.get_running_loop().run_in_executor(_LARGE_BODIES, call)


async def read_body(request: Request, limits: Limits, budget: Budget) -> bytearray:
    """Read a body of at most `body_bytes`, not compressed.

    Raises:
        MediaTypeError: if it is compressed.
        TooLargeError: as soon as its length, or what came of it, is too much.
        QueueFullError: if all bodies together are too much.
        TimedOutError: if it comes too slowly.

    """
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise MediaTypeError("content-encoding: a body is taken as it is, not compressed")
    error = TooLargeError(f"the body is too large; at most {limits.body_bytes} bytes are taken")
    announced = request.headers.get("content-length", "0")
    if len(announced) > 19 or int(announced) > limits.body_bytes:  # the protocol lets digits alone pass
        raise error
    data, clock = bytearray(), asyncio.get_running_loop().time
    try:
        async with asyncio.timeout(limits.body_seconds) as patience:
            async for chunk in request.stream():
                data += chunk
                if len(data) > limits.body_bytes:
                    raise error
                budget.take(request, len(chunk), len(data) <= limits.small_body_bytes)
                earned = (patience.when() or 0.0) + len(chunk) / limits.body_rate
                patience.reschedule(min(earned, clock() + limits.body_seconds))
    except TimeoutError as late:
        raise TimedOutError(f"the body came more slowly than {limits.body_rate} bytes a second") from late
    return data


def _parse_json(data: bytearray, limits: Limits) -> Body:
    """Parse an object, and refuse what is not in JSON's grammar, or what two readers would read differently."""
    if is_blank(data):
        raise MalformedRequestError("the body is empty; it takes a JSON object")
    if has_more(data, (b"[", b"{", b",", b"\\"), limits.json_items):
        raise MalformedRequestError(f"the body has more than {limits.json_items} items and escapes")
    try:
        texts = LongTexts(data)
    except UnicodeError as error:
        raise MalformedRequestError("the body is not UTF-8") from error
    except ValueError as error:
        raise MalformedRequestError(f"the body is not JSON: {error}") from error
    try:
        value = json.loads(
            texts.rest.decode(),
            object_pairs_hook=_unique,
            parse_constant=_refuse_constant,
            parse_float=_finite,
            parse_int=_integer,
        )
        _check_text(value)
        value = texts.put_back(value)
    except UnicodeError as error:
        raise MalformedRequestError("the body is not UTF-8, or has half of a surrogate pair") from error
    except json.JSONDecodeError as error:
        where = "" if texts.are_there else f" at character {error.pos}"
        raise MalformedRequestError(f"the body is not JSON: {error.msg}{where}") from error
    except RecursionError as error:
        raise MalformedRequestError("the body is nested too deeply") from error
    if not isinstance(value, dict):
        raise MalformedRequestError("the body is not a JSON object")
    return Body(value, is_form=False)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise about(name, "is given twice")
        found[name] = value
    return found


def about(name: str, problem: str) -> MalformedRequestError:
    """Return the error that says what is wrong with a field or part, whatever its name is."""
    shown = name[:100].encode("utf-8", "backslashreplace").decode()  # it may be half of a surrogate pair
    return MalformedRequestError.rebuilt(f"{shown}: {problem}", shown)


def _refuse_constant(name: str) -> NoReturn:
    raise MalformedRequestError(f"the body is not JSON: {name} is no number")


def _finite(text: str) -> int | float:
    value = read_number(text) if len(text) <= _NUMBER_LENGTH else math.inf
    if not math.isfinite(value):
        raise MalformedRequestError("the body has a number that is too large or too long")
    return value


def read_number(text: str) -> int | float:
    """Return the value of a number in JSON's grammar: `3.0` and `3e0` are whole, to the last digit (JSON Schema)."""
    value = float(text)
    if abs(value) < 10.0**_INTEGER_LENGTH and (exact := Decimal(text)) == exact.to_integral_value():
        return int(exact)
    return value


def _integer(text: str) -> int:
    if len(text) > _INTEGER_LENGTH:
        raise MalformedRequestError(f"the body has a whole number of more than {_INTEGER_LENGTH} digits")
    return int(text)


def _check_text(value: Any) -> None:
    """Raise UnicodeEncodeError for text that has half of a surrogate pair, which no one can encode again."""
    if isinstance(value, str):
        if not value.isascii():
            value.encode()
    elif isinstance(value, list):
        for entry in value:
            _check_text(entry)
    elif isinstance(value, dict):
        for name, entry in value.items():
            _check_text(name)
            _check_text(entry)


@dataclass
class _Part:
    """One part of a form, as the parser finds it; names of headers are in lower case."""

    headers: dict[bytes, bytes] = field(default_factory=dict)
    content: bytearray = field(default_factory=bytearray)


class _Parts:
    """Collect the parts of a form."""

    def __init__(self, limits: Limits) -> None:
        self.found: list[_Part] = []
        self.is_complete = False
        self._limits = limits
        self._name, self._value = bytearray(), bytearray()
        self._num_header_bytes = 0

    def callbacks(self) -> dict[str, Any]:
        return {
            "on_part_begin": self._begin,
            "on_part_data": lambda data, start, end: self.found[-1].content.extend(data[start:end]),
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


def _parse_form(data: bytearray, limits: Limits, boundary: bytes) -> Body:
    parts = _Parts(limits)
    try:
        if not boundary:
            raise MalformedRequestError("the form's content-type has no boundary")
        parser = MultipartParser(boundary, parts.callbacks())  # type: ignore[arg-type]  # its keys are these
        parser.write(bytes(data))
    except FormParserError as error:
        raise MalformedRequestError("the body is no multipart form with that boundary") from error
    if not parts.is_complete:
        raise MalformedRequestError("the form ends before its last boundary")
    fields: dict[str, Any] = {}
    files = []
    for part in parts.found:
        options = parse_options_header(part.headers.get(b"content-disposition"))[1]
        name = options.get(b"name", b"").decode("utf-8", "replace")
        value = _value(name, part, is_file=b"filename" in options)
        if isinstance(value, Upload):
            if not value.data and not options.get(b"filename"):
                continue  # a browser's input for a file, in which none was chosen
            files.append(value.data)
        _insert(fields, name, value)
    return Body(fields, is_form=True, files=tuple(files))


def _value(name: str, part: _Part, is_file: bool) -> Upload | str:
    """Return a part's text, or its bytes where it is a file or no text: a file need not have a name (RFC 7578, 4.2)."""
    media_type, options = parse_options_header(part.headers.get(b"content-type"))
    coding = part.headers.get(b"content-transfer-encoding", b"binary").strip().lower()
    if coding not in _PLAIN_CODINGS:
        raise about(name, "a part is taken as it is, without a content-transfer-encoding")
    if media_type.startswith(b"multipart/"):
        raise about(name, "several files are several parts, each named image[]")
    if is_file or not (media_type in (b"", b"application/json") or media_type.startswith(b"text/")):
        return Upload(bytes(part.content))
    if options.get(b"charset", b"utf-8").lower() not in _CHARSETS:
        raise about(name, "text is taken as UTF-8 alone")
    try:
        return part.content.decode()
    except UnicodeDecodeError:
        return Upload(bytes(part.content), "bytes that are no UTF-8 text,")


def _insert(fields: dict[str, Any], name: str, value: Upload | str) -> None:
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


def _put(place: Any, key: str, value: Upload | str, name: str) -> None:
    if key == "":
        _expect(place, list, name).append(value)
    elif key not in _expect(place, dict, name):
        place[key] = value
    else:
        before = place[key] if isinstance(place[key], Repeated) else Repeated([_expect(place[key], Upload | str, name)])
        place[key] = Repeated([*before, value])


def _expect(place: Any, kind: Any, name: str) -> Any:
    if not isinstance(place, kind):
        raise about(name, "is given in two forms")
    return place
