"""A request's body: read within its bounds, and parsed as what it says it is."""

from __future__ import annotations

import asyncio
import functools
import traceback
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar, TypeVarTuple

from python_multipart.multipart import parse_options_header
from starlette.requests import Request

from safelight.encoded import give_back_memory
from safelight.errors import SafelightError
from safelight.serving.http.disconnects import unless_gone
from safelight.serving.http.errors import MalformedRequestError, MediaTypeError, TimedOutError, TooLargeError
from safelight.serving.http.forms import CHARSETS, parse_form
from safelight.serving.http.held_bytes import HeldBytes
from safelight.serving.http.json_body import parse_json
from safelight.serving.http.spool import IN_MEMORY, Spool, Stored
from safelight.serving.limits import Limits

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

_LARGE_BODIES = ThreadPoolExecutor(1, thread_name_prefix="safelight-bodies")
"""They are looked at one after another: threads take the interpreter from each other, and most from the event loop."""
_BODIES = ThreadPoolExecutor(1, thread_name_prefix="safelight-small-bodies")
"""For those that are in memory, and do not wait for large ones."""
_AT_ONCE_PARSED = 1 << 12
"""Bytes of a body that is looked at where it is read: half a millisecond, whatever is in it."""
_WRITER = ThreadPoolExecutor(1, thread_name_prefix="safelight-spool")
"""Writes what comes of large bodies, so that a slow disk holds up those alone."""
_MEDIA_TYPE_LENGTH = 1000


@dataclass(frozen=True)
class Body:
    """What a client sent.

    Attributes:
        spool: where what is long in it is, and what is decoded from that can be.
        is_form: whether it was a form.
        is_long: whether looking at its fields may take a while, so that it is for a thread.
        fields: by name; from a form, every scalar is text or an `Upload`.
        files: the files of a form, in their order.

    """

    spool: Spool
    is_form: bool
    is_long: bool
    fields: Mapping[str, Any] = field(default_factory=dict)
    files: tuple[bytes | Stored, ...] = ()


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
    parse = functools.partial(parse_form, boundary=options.get(b"boundary", b"")) if is_form else parse_json
    body = Body(spool, is_form, spool.in_file or spool.num_bytes > _AT_ONCE_PARSED)
    fields, files = await unless_gone(request.receive, aside(body, parse, spool, limits))
    return replace(body, fields=fields, files=files)


async def aside(body: Body, function: Callable[[*Ts], T], *args: *Ts) -> T:
    """Call what looks at all of a body: in a thread where that is long, so that the event loop goes on."""
    if not body.is_long:
        return function(*args)
    loop = asyncio.get_running_loop()
    if body.spool.in_file:
        return await loop.run_in_executor(_LARGE_BODIES, _given_back, function, *args)
    return await loop.run_in_executor(_BODIES, function, *args)


def _given_back(function: Callable[[*Ts], T], *args: *Ts) -> T:
    """Call what takes memory for a while, and give it back: neither an error nor the allocator keeps it."""
    try:
        return function(*args)
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
