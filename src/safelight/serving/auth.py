"""The one check of the key, which every route is behind. Plain ASGI, so that streams pass."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from safelight.errors import SafelightError
from safelight.serving.addresses import Addresses
from safelight.serving.http.errors import AuthenticationError, ForeignHostError, ForeignOriginError
from safelight.serving.http.hosts import Hosts
from safelight.serving.http.origins import Origins, is_preflight, preflight_answer
from safelight.serving.principals import ANYONE, BY_ADDRESS, Keys, Principal

LIVE_PATH = "/livez"
"""The one route that needs no key."""
_OTHER_NAME = "without a key, the server answers to localhost alone, and to names in the setting allowed_hosts"
_MAY_NOT_ASK = "pages of this origin may not use the server; its setting allowed_origins names who may"
_MAY_NOT_SEND = "without a key, web pages of another origin are answered if the setting allowed_origins names it"


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
        """Pass a request on, or raise why not; answer a browser that asks whether it may send one (CORS)."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        if is_preflight(scope, headers):
            self._check_page(headers, _MAY_NOT_ASK)
            await preflight_answer(headers)(scope, receive, send)
            return
        try:
            scope["state"]["principal"] = self._principal(scope, headers)
        except SafelightError:
            if scope["type"] == "http":
                raise
            await send({"type": "websocket.close", "code": 1008})
        else:
            await self._app(scope, receive, send)

    def _principal(self, scope: Scope, headers: Headers) -> Principal:
        """Return who sends a request that is let in."""
        is_http = scope["type"] == "http"
        if is_http and self._addresses.judges(scope):
            self._addresses.check(scope)
            return BY_ADDRESS
        if not self._keys:
            self._check_page(headers, _MAY_NOT_SEND)
            return ANYONE
        if is_http and scope["path"] == LIVE_PATH:
            return ANYONE
        principal = self._keys.principal(_token(headers))
        if principal is None:
            raise AuthenticationError("a key is needed: Authorization: Bearer KEY")
        return principal

    def _check_page(self, headers: Headers, message: str) -> None:
        """Refuse a web page that may not use the server; without a key, one too that has the server by another name."""
        if not self._keys and self._hosts.is_foreign(headers):
            raise ForeignHostError(_OTHER_NAME)
        if self._origins.is_foreign(headers):
            raise ForeignOriginError(message)


def _token(headers: Headers) -> str:
    """Return what `Authorization` gives by the scheme `Bearer`, in whatever case (RFC 9110, 11.1)."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""
