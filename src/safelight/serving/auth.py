"""What surrounds every request: its id, its key, and an answer whatever happens. Plain ASGI, so streams pass."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import logging
import secrets
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from safelight.errors import SafelightError
from safelight.serving.errors import AuthenticationError, ForeignOriginError, error_response

LIVE_PATH = "/livez"
"""The one route that needs no key."""
logger = logging.getLogger(__name__)


class KeyCheck:
    """Let a request in only with the server's key; every scope and every route but `/livez`.

    Without a key everyone on the machine is let in, but not the web pages that they look at.

    Args:
        app: what is behind it.
        key: the key, given as `Authorization: Bearer`; None lets everyone in.

    """

    def __init__(self, app: ASGIApp, key: str | None) -> None:
        self._app = app
        self._digest = None if key is None else _digest(f"Bearer {key}")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 401, or pass the request on."""
        open_to_all = scope["type"] == "lifespan" or self._digest is None
        if scope["type"] == "http" and self._digest is None and is_foreign(Headers(scope=scope)):
            error = ForeignOriginError("without a key, web pages of another origin are not answered")
            await error_response(error)(scope, receive, send)
        elif open_to_all or (scope["type"] == "http" and scope["path"] == LIVE_PATH) or self._knows(scope):
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await error_response(AuthenticationError("a key is needed: Authorization: Bearer KEY"))(
                scope, receive, send
            )
        else:
            await send({"type": "websocket.close", "code": 1008})

    def _knows(self, scope: Scope) -> bool:
        given = Headers(scope=scope).get("authorization", "")
        assert self._digest is not None
        return hmac.compare_digest(_digest(given), self._digest)


def is_foreign(headers: Headers) -> bool:
    """Say whether a browser sends this for a page that is not the server's own: it may not spend what the user has."""
    origin = headers.get("origin")
    return origin is not None and urlsplit(origin).netloc != headers.get("host", "")


def _digest(text: str) -> bytes:
    """Hash both sides, so that their comparison takes the same time whatever their lengths."""
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()


class Envelope:
    """Give every response an `x-request-id`, and every failure of ours a 500 in the API's form.

    What a request registers with `state["at_end"]`, an `ExitStack`, is done when it has been answered.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run what is behind it; nothing that it raises gets out, so that its connection stays usable."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id, started = new_request_id(), False

        async def named(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            with contextlib.ExitStack() as at_end:
                scope.setdefault("state", {})["at_end"] = at_end
                await self._app(scope, receive, named)
        except Exception:  # the boundary of a request
            logger.exception("request %s failed", request_id)
            if started:
                raise  # what was promised cannot be sent any more: the server ends the connection
            await error_response(SafelightError("internal"))(scope, receive, named)


def new_request_id() -> str:
    """Return a fresh id, which says nothing."""
    return f"req_{secrets.token_hex(16)}"
