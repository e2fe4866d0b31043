"""The one check of the key, which every route is behind. Plain ASGI, so that streams pass."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from safelight.errors import SafelightError
from safelight.serving.addresses import Addresses
from safelight.serving.http.errors import AuthenticationError, ForeignHostError, ForeignOriginError, error_response
from safelight.serving.http.hosts import Hosts
from safelight.serving.http.origins import Origins
from safelight.serving.principals import ANYONE, BY_ADDRESS, Keys, Principal

LIVE_PATH = "/livez"
"""The one route that needs no key."""


class KeyCheck:
    """Let a request in only with a key of the server's; every scope and every route but `/livez`, and signed addresses.

    Who sent it is in its state as `principal`.

    Without a key everyone on the machine is let in, but not the web pages that they look at, unless their origin is
    allowed; nor what asks for the server under a name that is not this machine's. It must stand behind what makes paths
    plain, so that it sees the path that the router sees.

    Args:
        app: what is behind it.
        keys: one of them is given as `Authorization: Bearer`; where there are none, everyone is let in.
        origins: whose pages may use the server.
        hosts: the names that it answers to where there is no key.
        addresses: that open by their signature.

    """

    def __init__(self, app: ASGIApp, keys: Keys, origins: Origins, hosts: Hosts, addresses: Addresses) -> None:
        self._app, self._keys, self._origins, self._hosts, self._addresses = app, keys, origins, hosts, addresses

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 401 or 403, or pass the request on."""
        found = None if scope["type"] == "lifespan" else self._principal(scope)
        if found is None:
            await self._app(scope, receive, send)
        elif isinstance(found, Principal):
            await self._app({**scope, "state": {**scope.get("state", {}), "principal": found}}, receive, send)
        elif scope["type"] == "http":
            await error_response(found)(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1008})

    def _principal(self, scope: Scope) -> Principal | SafelightError:
        """Return who sends a request, or why it is not let in."""
        headers, is_http = Headers(scope=scope), scope["type"] == "http"
        if is_http and self._addresses.judges(scope):
            return self._addresses.refusal(scope) or BY_ADDRESS
        if not self._keys:
            return self._foreign(headers) or ANYONE
        if is_http and scope["path"] == LIVE_PATH:
            return ANYONE
        refusal = AuthenticationError("a key is needed: Authorization: Bearer KEY")
        return self._keys.principal(_token(headers)) or refusal

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
