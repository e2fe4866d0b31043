"""Errors that only HTTP knows, and the one form in which every error leaves the server."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from safelight.errors import (
    MAX_NAME,
    ModelNotFoundError,
    NotReadyError,
    QueueFullError,
    SafelightError,
    UsageError,
    without_objects,
)

logger = logging.getLogger(__name__)


class MalformedRequestError(UsageError):
    """The body or a header cannot be read as what it says it is."""

    code = "malformed_request"


class TooLargeError(UsageError):
    """More was sent than is taken."""

    status, code = 413, "too_large"


class MediaTypeError(UsageError):
    """A content type or encoding that the route does not take."""

    status, code = 415, "unsupported_media_type"


class HeadersTooLargeError(UsageError):
    """More headers than are taken."""

    status, code = 431, "headers_too_large"


class TimedOutError(UsageError):
    """The request did not arrive in time."""

    status, code = 408, "request_timeout"


class ForeignOriginError(SafelightError):
    """A web page of another origin sent the request, to a server that asks for no key."""

    status, code = 403, "foreign_origin"


class ForeignHostError(SafelightError):
    """The server was asked for under another name than its own, and asks for no key."""

    status, code = 403, "foreign_host"


class AddressError(UsageError):
    """The signature of an address is not this server's, or not of this address."""

    status, code = 403, "invalid_signature"


class ExpiredAddressError(AddressError):
    """A signed address has come to its end."""

    code = "address_expired"


class AuthenticationError(UsageError):
    """No key, or a wrong one."""

    status, code = 401, "invalid_api_key"


class PriorityError(UsageError):
    """The key may not have a priority as high as was asked for."""

    status, code, param = 403, "priority_not_allowed", "priority"

    def __init__(self, got: int, most: int) -> None:
        super().__init__(f"priority: got {got}; this key takes at most {most}")


class ModelNameError(ModelNotFoundError):
    """Another model was asked for than the one that is served."""

    param = "model"


class NotFoundError(UsageError):
    """There is nothing of that name."""

    status, code = 404, "not_found"


class MethodError(UsageError):
    """The path exists, and takes other methods.

    Attributes:
        allowed: which.

    """

    status, code = 405, "method_not_allowed"

    def __init__(self, allowed: str) -> None:
        self.allowed = allowed
        super().__init__(f"this route takes {allowed}")


class ConflictStateError(UsageError):
    """It cannot be had in the state that it is in."""

    status, code = 409, "not_completed"


class RangeError(UsageError):
    """No byte of the range that was asked for is in the file.

    Attributes:
        size: of the file, in bytes.

    """

    status, code, param = 416, "invalid_range", "range"

    def __init__(self, size: int) -> None:
        self.size = size
        super().__init__(f"range: the file has {size} bytes")


GONE = 499
"""The status for a client that closed its connection; nobody reads it."""
_READY_AFTER = 5
"""Seconds after which a client that was told `not_ready` may ask again: nothing of its request was begun."""
_TYPES: Mapping[int, str] = {401: "authentication_error", 429: "rate_limit_error"}
"""Kinds of errors that SDKs sort by, of statuses that have their own."""
_MAX_MESSAGE = 8000
"""Characters of an answer's message: the names of all fields are fewer."""
_INTERNAL = "the server made a mistake; its log has the details under this request's x-request-id"


def is_internal(error: SafelightError) -> bool:
    """Say whether it is a mistake of ours, which the log has and no answer tells."""
    return error.code == SafelightError.code


def answerable(error: Exception, request_id: str) -> SafelightError:
    """Return what ended a request as it may be answered.

    A mistake of ours is told to the log alone, under the id that the client is told.
    """
    known = error if isinstance(error, SafelightError) else SafelightError("this was not foreseen")
    if is_internal(known):
        cause = error.__cause__ if known is error else error
        logger.error("request %s failed: %s", request_id, known, exc_info=cause)
    return known


def error_body(error: SafelightError) -> dict[str, Any]:
    """Return an error as `{"error": {message, type, param, code}}`.

    An object of Python's in a message of ours is a picture that was refused.
    """
    message = _INTERNAL if is_internal(error) else without_objects(str(error)[:_MAX_MESSAGE], lambda _: "an image")
    return {
        "error": {
            "message": message,
            "type": _TYPES.get(error.status, "server_error" if error.status >= 500 else "invalid_request_error"),
            "param": error.param and error.param[:MAX_NAME],
            "code": error.code,
        }
    }


def error_headers(error: SafelightError) -> dict[str, str]:
    """Return the headers that tell a client whether and when to try again."""
    if isinstance(error, NotReadyError):
        return {"x-should-retry": "true", "retry-after": str(_READY_AFTER)}
    if error.status >= 500:
        return {"x-should-retry": "false"}
    if isinstance(error, TimedOutError):
        return {"connection": "close"}
    if isinstance(error, QueueFullError):
        return {"retry-after": str(math.ceil(error.retry_after))}
    if isinstance(error, RangeError):
        return {"content-range": f"bytes */{error.size}"}
    if isinstance(error, MethodError):
        return {"allow": error.allowed}
    return {"www-authenticate": "Bearer"} if error.status == HTTPStatus.UNAUTHORIZED else {}


def raw_answer(error: SafelightError, more: Mapping[str, str] | None = None) -> bytes:
    """Return an error as HTTP/1.1, on a connection that ends with it; `more` are further headers."""
    body = json.dumps(error_body(error)).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body)), "connection": "close"}
    lines = [f"{name}: {value}" for name, value in {**error_headers(error), **headers, **(more or {})}.items()]
    head = [f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}", *lines]
    return "\r\n".join(head).encode("ascii") + b"\r\n\r\n" + body
