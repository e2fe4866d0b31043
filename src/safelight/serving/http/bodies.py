"""A request's body, read within its bounds and parsed strictly: JSON here, a multipart form in `forms`."""

from __future__ import annotations

import asyncio
import functools
import json
import math
import traceback
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path
from typing import Any, NoReturn, ParamSpec, TypeVar

from python_multipart.multipart import parse_options_header
from starlette.requests import Request

from safelight.encoded import give_back_memory
from safelight.errors import QueueFullError, SafelightError
from safelight.serving.http.disconnects import unless_gone
from safelight.serving.http.errors import MalformedRequestError, MediaTypeError, TimedOutError, TooLargeError
from safelight.serving.http.forms import CHARSETS, about, parse_form
from safelight.serving.http.long_texts import LongTexts
from safelight.serving.http.pieces import ControlError, has_more, is_blank
from safelight.serving.http.spool import IN_MEMORY, Spool, Stored
from safelight.serving.limits import Limits

P = ParamSpec("P")
T = TypeVar("T")

_LARGE_BODIES = ThreadPoolExecutor(1, thread_name_prefix="safelight-bodies")
"""They are looked at one after another: threads take the interpreter from each other, and most from the event loop."""
_BODIES = ThreadPoolExecutor(1, thread_name_prefix="safelight-small-bodies")
"""For those that are in memory, and do not wait for large ones."""
_AT_ONCE_PARSED = 1 << 12
"""Bytes of a body that is looked at where it is read: half a millisecond, whatever is in it."""
_WRITER = ThreadPoolExecutor(1, thread_name_prefix="safelight-spool")
"""Writes what comes of large bodies, so that a slow disk holds up those alone."""
_AT_ONCE = 1 << 19
"""Bytes of one body that are written together, where there is memory for them."""
_NUMBER_LENGTH = 400
_INTEGER_LENGTH = 40
_KEPT_PART = 8
_MEDIA_TYPE_LENGTH = 1000


@dataclass(frozen=True)
class Body:
    """What a client sent.

    Attributes:
        fields: by name; from a form, every scalar is text or an `Upload`.
        is_form: whether it was a form.
        files: the files of a form, in their order.
        spool: where what is long in it is, and what is decoded from that can be.
        is_long: whether looking at its fields may take a while, so that it is for a thread.

    """

    fields: Mapping[str, Any]
    is_form: bool
    files: tuple[bytes | Stored, ...] = ()
    spool: Spool | None = None
    is_long: bool = False


class HeldBytes:
    """Bytes that all requests under way hold together: on disk, and of small bodies in memory.

    Args:
        limits: the bounds.
        directory: where the files of large bodies are. They have no names.

    """

    def __init__(self, limits: Limits, directory: Path) -> None:
        self.directory = directory
        self._limits = limits
        self._held = self._in_memory = 0

    def share(self, request: Request) -> Share:
        """Return a request's share, which is given back when it has been answered."""
        share = Share(self)
        request.scope["state"]["at_end"].callback(share.give_back)
        return share

    def take(self, num_bytes: int, is_small: bool) -> None:
        """Count bytes. The last eighth is for what is small.

        Raises:
            QueueFullError: if others hold so many that these are too many.

        """
        most = self._limits.held_bytes
        if self._held + num_bytes > (most if is_small else most - most // _KEPT_PART):
            raise QueueFullError("too much is being received and decoded at once; try again later")
        self._held += num_bytes

    def keep(self, num_bytes: int) -> bool:
        """Count bytes in memory, if there is room for them; say whether there is."""
        if self._in_memory + num_bytes > self._limits.memory_bytes:
            return False
        self._in_memory += num_bytes
        return True

    def give_back(self, num_bytes: int, in_memory: int) -> None:
        """Count bytes no longer."""
        self._held -= num_bytes
        self._in_memory -= in_memory


class Share:
    """What one request holds of a `HeldBytes`."""

    def __init__(self, held: HeldBytes) -> None:
        self._of_all = held
        self._held = self._in_memory = 0

    def take(self, num_bytes: int, is_small: bool) -> None:
        """Count bytes, as `HeldBytes.take` does."""
        self._of_all.take(num_bytes, is_small)
        self._held += num_bytes

    def keep(self, num_bytes: int) -> bool:
        """Count bytes in memory, as `HeldBytes.keep` does; no more than are written at once."""
        if self._in_memory + num_bytes > _AT_ONCE or not self._of_all.keep(num_bytes):
            return False
        self._in_memory += num_bytes
        return True

    def written(self) -> None:
        """Count nothing in memory any more."""
        self._of_all.give_back(0, self._in_memory)
        self._in_memory = 0

    def give_back(self) -> None:
        """Count nothing any more."""
        self._of_all.give_back(self._held, self._in_memory)
        self._held = self._in_memory = 0


async def read_fields(request: Request, limits: Limits, held: HeldBytes, forms: bool) -> Body:
    """Read and parse a request's body.

    Args:
        request: whose body has not been read.
        limits: the bounds.
        held: what its bytes count against.
        forms: whether a multipart form is taken as well as JSON.

    Raises:
        MediaTypeError, TooLargeError, MalformedRequestError: for what is not taken.
        ClientDisconnect: if the client goes away before the body's turn.

    """
    described = request.headers.get("content-type", "")
    if len(described) > _MEDIA_TYPE_LENGTH:
        raise MalformedRequestError(f"content-type: at most {_MEDIA_TYPE_LENGTH} characters are taken")
    media_type, options = parse_options_header(described)
    is_form = forms and media_type == b"multipart/form-data"
    if not is_form and media_type != b"application/json":
        takes = "application/json or multipart/form-data" if forms else "application/json"
        raise MediaTypeError(f"content-type: this route takes {takes}")
    if options.get(b"charset", b"utf-8").lower() not in CHARSETS:
        raise MediaTypeError("content-type: text is taken as UTF-8 alone")
    spool = await read_body(request, limits, held)
    parse, arguments = (_form, (options.get(b"boundary", b""),)) if is_form else (_parse_json, ())
    if spool.num_bytes <= _AT_ONCE_PARSED and not spool.in_file:
        return parse(spool, limits, *arguments)
    body = await unless_gone(request.receive, _in_turn(spool, parse, spool, limits, *arguments))
    return replace(body, is_long=True)


def _given_back(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call what takes memory for a while, and give it back: neither an error nor the allocator keeps it."""
    try:
        return function(*args, **kwargs)
    except SafelightError as error:
        _forget_frames(error)
        raise
    finally:
        give_back_memory()


def _forget_frames(error: SafelightError) -> None:
    """Let go of what the calls had that an error ended. Not in their caller: the error would lead to itself there."""
    for each in (error, error.__cause__, error.__context__):
        if each is not None:
            traceback.clear_frames(each.__traceback__)


def _form(spool: Spool, limits: Limits, boundary: bytes) -> Body:
    fields, files = parse_form(spool, limits, boundary)
    return Body(fields, is_form=True, files=files, spool=spool)


async def aside(body: Body, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call what looks at all of a body: in a thread where that is long, so that the event loop goes on."""
    if body.spool is None or not body.is_long:
        return function(*args, **kwargs)
    return await _in_turn(body.spool, function, *args, **kwargs)


async def _in_turn(spool: Spool, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call it in the thread for bodies that are where this one is."""
    loop = asyncio.get_running_loop()
    if spool.in_file:
        return await loop.run_in_executor(_LARGE_BODIES, functools.partial(_given_back, function, *args, **kwargs))
    return await loop.run_in_executor(_BODIES, functools.partial(function, *args, **kwargs))


async def read_body(request: Request, limits: Limits, held: HeldBytes) -> Spool:
    """Read a body of at most `body_bytes`, not compressed; what is large of it waits in a file.

    Raises:
        MediaTypeError: if it is compressed.
        TooLargeError: as soon as its length, or what came of it, is too much.
        QueueFullError: if all bodies together are too much.
        StorageFullError: if there is no room on the disk.
        TimedOutError: if it comes too slowly.

    """
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise MediaTypeError("content-encoding: a body is taken as it is, not compressed")
    error = TooLargeError(f"the body is too large; at most {limits.body_bytes} bytes are taken")
    announced = request.headers.get("content-length", "0")
    if len(announced) > 19 or int(announced) > limits.body_bytes:  # the protocol lets digits alone pass
        raise error
    loop = asyncio.get_running_loop()
    spool, share = Spool(held.directory), held.share(request)
    num_bytes = 0
    try:
        async with asyncio.timeout(limits.body_seconds) as patience:
            async for chunk in request.stream():
                num_bytes += len(chunk)
                if num_bytes > limits.body_bytes:
                    raise error
                share.take(len(chunk), num_bytes <= limits.small_body_bytes)
                earned = (patience.when() or 0.0) + len(chunk) / limits.body_rate
                patience.reschedule(min(earned, loop.time() + limits.body_seconds))
                spool.keep(chunk)
                if not share.keep(len(chunk)):
                    await loop.run_in_executor(_WRITER, spool.flush)
                    share.written()
            if spool.in_file or num_bytes > IN_MEMORY:
                await loop.run_in_executor(_WRITER, spool.flush)
                share.written()
    except TimeoutError as late:
        raise TimedOutError(f"the body came more slowly than {limits.body_rate} bytes a second") from late
    return spool


def _parse_json(spool: Spool, limits: Limits) -> Body:
    """Parse an object, and refuse what is not in JSON's grammar, or what two readers would read differently."""
    data = spool.all().buffer()
    if is_blank(data):
        raise MalformedRequestError("the body is empty; it takes a JSON object")
    if has_more(data, limits.json_items):
        raise MalformedRequestError(f"the body has more than {limits.json_items} items and escapes")
    try:
        texts = LongTexts(data, spool)
    except UnicodeError as error:
        raise MalformedRequestError("the body is not UTF-8") from error
    except ControlError as error:
        raise MalformedRequestError(f"the body is not JSON: {error}") from error
    del data
    rest = texts.rest
    if len(rest) > limits.json_bytes:
        raise TooLargeError(f"the body has more than {limits.json_bytes} bytes beside long texts without escapes")
    return Body(_loaded(rest, texts), is_form=False, spool=spool)


def _loaded(rest: bytearray, texts: LongTexts) -> dict[str, Any]:
    try:
        value = json.loads(
            rest.decode(),
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
        where, error.doc = "" if texts.are_there else f" at character {error.pos}", ""
        raise MalformedRequestError(f"the body is not JSON: {error.msg}{where}") from error
    except RecursionError as error:
        raise MalformedRequestError("the body is nested too deeply") from error
    if not isinstance(value, dict):
        raise MalformedRequestError("the body is not a JSON object")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise about(name, "is given twice")
        found[name] = value
    return found


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
