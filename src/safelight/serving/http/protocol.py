"""The HTTP/1.1 protocol under uvicorn, with the deadlines and the form of errors that uvicorn does not have."""

from __future__ import annotations

import asyncio
import fcntl
import struct
import sys
import termios
from collections.abc import Iterable
from http import HTTPStatus
from typing import Any, ClassVar, NoReturn

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from safelight.errors import SafelightError
from safelight.serving.http.envelope import new_request_id
from safelight.serving.http.errors import HeadersTooLargeError, MalformedRequestError, TimedOutError, raw_answer
from safelight.serving.limits import Limits

_FREE_CHUNKS = 1000
_SMALLEST_CHUNK = 256
"""Bytes in a chunk, on average, after the first `_FREE_CHUNKS`: each costs 10 µs to parse, however small."""
_BACKLOG = 128
"""Connections that wait to be taken. Those whose clients have left wait too, before everybody who comes after them."""
_READ_BYTES = 1 << 16
"""That are read of a connection at once. As many may wait here unread, of each; asyncio reads four times as many."""
_CHECKS = 4
"""How often, in its time, a reader is looked at."""
_DISCARDED_BODIES = 4
"""Bodies of full size that are read and thrown away after a request was refused, so that its client reads why."""
_LINGER_SECONDS = 2.0
"""For which a connection is still read after what came on it was refused: closed at once, with bytes unread, it would
be reset, and a client in the midst of sending would not come to read why."""


class Connection(h11.Connection):
    """An h11 connection that bounds headers and chunks, and remembers why it refused."""

    def __init__(self, max_header_bytes: int, max_headers: int) -> None:
        super().__init__(h11.SERVER, max_header_bytes)
        self.refusal: SafelightError = MalformedRequestError("this is not HTTP/1.1")
        self._max_header_bytes, self._max_headers = max_header_bytes, max_headers
        self._too_large = HeadersTooLargeError(
            f"at most {max_headers} headers of {max_header_bytes} bytes in all are taken"
        )
        self._chunks = self._bytes = 0

    def next_event(self) -> Any:
        """Return the next event of the request.

        Raises:
            h11.RemoteProtocolError: where `refusal` says why.

        """
        if self.their_state is h11.IDLE:
            self._look_at_head(self.trailing_data[0])
        try:
            event = super().next_event()
        except h11.RemoteProtocolError as error:
            if error.error_status_hint == HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE:
                self.refusal = self._too_large
            raise
        if isinstance(event, h11.Request):
            self._chunks = self._bytes = 0
            names = [name for name, _ in event.headers]
            if b"content-length" in names and b"transfer-encoding" in names:
                self._refuse(MalformedRequestError("the body has a Content-Length and a Transfer-Encoding"))
        elif isinstance(event, h11.EndOfMessage) and self._are_too_many(event.headers):
            self._refuse(self._too_large)
        elif isinstance(event, h11.Data):
            self._chunks += event.chunk_end
            self._bytes += len(event.data)
            if self._chunks > _FREE_CHUNKS and self._bytes < self._chunks * _SMALLEST_CHUNK:
                self._refuse(MalformedRequestError("the body comes in too many small chunks"))
        return event

    def _look_at_head(self, data: bytes) -> None:
        """Refuse a head that is too large or has too many lines before it is parsed, which costs 2 µs a line."""
        ends = [end for mark in (b"\n\r\n", b"\n\n") if (end := data.find(mark)) >= 0]
        end = min(ends, default=len(data))
        if end > self._max_header_bytes or data.count(b"\n", 0, end) > self._max_headers:
            self._refuse(self._too_large)

    def _are_too_many(self, trailers: Iterable[tuple[bytes, bytes]]) -> bool:
        sizes = [len(name) + len(value) for name, value in trailers]
        return len(sizes) > self._max_headers or sum(sizes) > self._max_header_bytes

    def _refuse(self, refusal: SafelightError) -> NoReturn:
        self.refusal = refusal
        raise h11.RemoteProtocolError(str(refusal))


class HttpProtocol(H11Protocol):
    """One connection, with deadlines for headers, for a whole request, and for a reader that takes nothing.

    Attributes:
        limits: the bounds; a subclass made by `uvicorn_config` has them.

    """

    limits: ClassVar[Limits] = Limits()

    conn: Connection

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.conn = Connection(self.limits.header_bytes, self.limits.headers)
        self._deadline: asyncio.TimerHandle | None = None
        self._look: asyncio.TimerHandle | None = None
        self._began = 0.0
        self._awaited: tuple[object, object] = (None, h11.IDLE)
        self._unsent = self._quiet = self._discarded = 0
        self._refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        """Begin to wait for the first request."""
        super().connection_made(transport)
        transport.max_size = _READ_BYTES  # type: ignore[attr-defined]  # of asyncio's transport for sockets
        self._await_request()
        self._look_later()

    def data_received(self, data: bytes) -> None:
        """Take in bytes, and set the deadline for those that are still to come."""
        answered = self.cycle is not None and self.cycle.response_complete
        if self._refused or (self.conn.their_state is h11.SEND_BODY and answered):
            self._discarded += len(data)
            if self._discarded > _DISCARDED_BODIES * self.limits.body_bytes:
                self.transport.abort()
                return
        if self._refused:
            return
        if self.conn.their_state is h11.IDLE and not self._has_part_of_headers():
            self._await_request()  # from its first byte, however long the connection was silent
        super().data_received(data)
        self._follow()

    def on_response_complete(self) -> None:
        """Go on to a request that came in the meantime, and waited for us until now."""
        self._began = self.loop.time()
        super().on_response_complete()
        self._follow()

    def eof_received(self) -> None:
        """Say what is missing to a client that ends in the middle of a request, and listens still."""
        if not self._refused and (self.conn.their_state is h11.SEND_BODY or self._has_part_of_headers()):
            self._refuse(MalformedRequestError("the request ends before its Content-Length, or in its headers"))

    def shutdown(self) -> None:
        """End, as the server does: at once, where nothing is answered any more."""
        if self._refused:
            self.transport.close()
        else:
            super().shutdown()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget every timer."""
        self._set_deadline(None)
        if self._look is not None:
            self._look.cancel()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Refuse what is not HTTP, in the API's form. uvicorn's name, and its words, which are not used."""
        self._refuse(self.conn.refusal)

    def _has_part_of_headers(self) -> bool:
        return self.conn.their_state is h11.IDLE and bool(self.conn.trailing_data[0])

    def _follow(self) -> None:
        """Set the deadline that belongs to the part of a request that is awaited now."""
        state = self.conn.their_state
        awaited = (self.cycle, state)
        if self._refused:
            return
        if self.transport.is_closing():
            self._set_deadline(None)
        elif awaited != self._awaited:
            self._awaited = awaited
            if state is h11.SEND_BODY:
                self._discarded = 0
                self._set_deadline(max(0.0, self._began + self.limits.request_seconds - self.loop.time()))
            elif self._has_part_of_headers() or (state is h11.IDLE and self.timeout_keep_alive_task is None):
                self._await_request()
            else:
                self._set_deadline(None)

    def _await_request(self) -> None:
        self._began = self.loop.time()
        self._set_deadline(self.limits.header_seconds)

    def _set_deadline(self, seconds: float | None) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        self._deadline = None if seconds is None else self.loop.call_later(seconds, self._too_late)

    def _too_late(self) -> None:
        if self._refused:
            self.transport.close()
        elif self.conn.their_state is h11.IDLE and not self._has_part_of_headers():
            self.transport.close()  # nobody asked anything
        else:
            self._refuse(TimedOutError("the request did not arrive whole in its time"))

    def _refuse(self, error: SafelightError) -> None:
        """Answer, unless an answer to this request has begun, and end the connection once its client has read that."""
        self._set_deadline(None)
        if self.transport.is_closing() or self._refused:
            return
        in_body = self._awaited == (self.cycle, h11.SEND_BODY)
        if not (self.cycle is not None and in_body and self.cycle.response_started):
            self.transport.write(raw_answer(error, {"x-request-id": new_request_id()}))
        if self.cycle is not None:
            self.cycle.disconnected = True  # what the application still sends goes nowhere
            self.cycle.message_event.set()
        self._refused, self._discarded = True, 0
        self._unset_keepalive_if_required()
        self.transport.write_eof()
        self.flow.resume_reading()
        self._set_deadline(_LINGER_SECONDS)

    def _look_later(self) -> None:
        self._look = self.loop.call_later(self.limits.stalled_seconds / _CHECKS, self._look_at_reader)

    def _look_at_reader(self) -> None:
        """Drop a reader that took nothing in all its time: while nothing is added, what is unsent can only shrink."""
        blocked = self.flow.write_paused or self.transport.is_closing()
        unsent = self._num_unsent() if blocked else 0
        self._quiet = self._quiet + 1 if unsent and unsent == self._unsent else 0
        self._unsent = unsent
        if self._quiet >= _CHECKS:
            self.transport.abort()
        else:
            self._look_later()

    def _num_unsent(self) -> int:
        """Return the bytes that the reader has not acknowledged: here, and in the kernel, which holds megabytes."""
        here = self.transport.get_write_buffer_size()
        sock = self.transport.get_extra_info("socket")
        if not here or sys.platform != "linux":
            return here
        (in_kernel,) = struct.unpack("i", fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, b"\0" * 4))
        return here + int(in_kernel)


def uvicorn_config(app: ASGIApp, limits: Limits) -> uvicorn.Config:
    """Return how uvicorn is to run the application: one process, this protocol, no websockets.

    Args:
        app: what `create_app` returns.
        limits: bounds of time and size.

    """
    protocol = type("LimitedHttpProtocol", (HttpProtocol,), {"limits": limits})
    return uvicorn.Config(
        app,
        port=0,  # one that is free, unless there is a socket already
        http=protocol,
        ws="none",
        lifespan="on",
        loop="asyncio",
        log_config=None,
        access_log=False,
        backlog=_BACKLOG,
        server_header=False,
        proxy_headers=False,
    )
