"""The one check of the key, which every route is behind. Plain ASGI, so that streams pass."""

from __future__ import annotations

import hashlib
import hmac

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from safelight.errors import SafelightError
from safelight.serving.addresses import Addresses
from safelight.serving.errors import AuthenticationError, ForeignHostError, ForeignOriginError, error_response
from safelight.serving.hosts import Hosts
from safelight.serving.origins import Origins

LIVE_PATH = "/livez"
"""The one route that needs no key."""


class KeyCheck:
    """Let a request in only with the server's key; every scope and every route but `/livez`, and signed addresses.

    Without a key everyone on the machine is let in, but not the web pages that they look at, unless their origin is
    allowed; nor what asks for the server under a name that is not this machine's. It must stand behind what makes paths
    plain, so that it sees the path that the router sees.

    Args:
        app: what is behind it.
        key: the key, given as `Authorization: Bearer`; None lets everyone in.
        origins: whose pages may use the server.
        hosts: the names that it answers to where there is no key.
        addresses: that open by their signature.

    """

    def __init__(self, app: ASGIApp, key: str | None, origins: Origins, hosts: Hosts, addresses: Addresses) -> None:
        self._app, self._origins, self._hosts, self._addresses = app, origins, hosts, addresses
        self._digest = None if key is None else _digest(key)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 401 or 403, or pass the request on."""
        refusal = None if scope["type"] == "lifespan" else self._refusal(scope)
        if refusal is None:
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await error_response(refusal)(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1008})

    def _refusal(self, scope: Scope) -> SafelightError | None:
        headers, is_http = Headers(scope=scope), scope["type"] == "http"
        if is_http and self._addresses.judges(scope):
            return self._addresses.refusal(scope)
        if self._digest is None:
            return self._foreign(headers)
        if (is_http and scope["path"] == LIVE_PATH) or hmac.compare_digest(_digest(_token(headers)), self._digest):
            return None
        return AuthenticationError("a key is needed: Authorization: Bearer KEY")

    def _foreign(self, headers: Headers) -> SafelightError | None:
        """Return why a browser's request is not let in without a key."""
        if self._hosts.is_foreign(headers):
            return ForeignHostError()
        message = "without a key, web pages of another origin are answered if the setting allowed_origins names it"
        return ForeignOriginError(message) if self._origins.is_foreign(headers) else None


def _token(headers: Headers) -> str:
    """Return what `Authorization` gives by the scheme `Bearer`, in whatever case (RFC 9110, 11.1)."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""


def _digest(text: str) -> bytes:
    """Hash both sides, so that their comparison takes the same time whatever their lengths."""
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()
