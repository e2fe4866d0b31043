"""Which web pages may use the server: browsers ask it (CORS), and say whose page sends a request."""

from __future__ import annotations

from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import Scope

ANY = "*"
_CROSS_SITE = "cross-site"
_METHODS = "GET, HEAD, POST, DELETE"
_EXPOSED = (
    "x-request-id, openai-poll-after-ms, retry-after, x-should-retry, location, preference-applied, "
    "content-length, content-range, accept-ranges, etag"
)
"""What a page may read of an answer's headers."""
_REMEMBERED = "600"
"""Seconds for which a browser need not ask again."""


@dataclass(frozen=True)
class Origins:
    """Whose pages may use the server, beside its own.

    Attributes:
        allowed: origins as browsers write them, or `*` for all.

    """

    allowed: tuple[str, ...] = ()

    def is_foreign(self, headers: Headers) -> bool:
        """Say whether a browser sends this for a page that may not spend what the user has here.

        Pictures, links and forms of other sites bear no origin that could be allowed, but browsers mark them.
        """
        origin = headers.get("origin")
        if self._allows(origin):
            return False
        sites = headers.get("sec-fetch-site", "").lower().split(",")  # of several, a proxy makes one so
        is_cross_site = _CROSS_SITE in (site.strip() for site in sites)
        return is_cross_site or (origin is not None and not _is_own(origin, headers))

    def answer_headers(self, headers: Headers) -> dict[str, str]:
        """Return the headers by which a browser lets a page read the answer; none for a page that may not."""
        found = {} if not self.allowed or ANY in self.allowed else {"vary": "origin"}
        origin = headers.get("origin")
        if origin is not None and self._allows(origin):
            found["access-control-allow-origin"] = ANY if ANY in self.allowed else origin
            found["access-control-expose-headers"] = _EXPOSED
        return found

    def _allows(self, origin: str | None) -> bool:
        return origin in self.allowed or ANY in self.allowed


def is_preflight(scope: Scope, headers: Headers) -> bool:
    """Say whether a browser asks this before it sends a page's request: without a key, since it sends none then."""
    named = "origin" in headers and "access-control-request-method" in headers
    return scope["type"] == "http" and scope["method"] == "OPTIONS" and named


def preflight_answer(headers: Headers) -> Response:
    """Return what tells a browser that the page may send its request."""
    asked = headers.get("access-control-request-headers")
    answer = {"access-control-allow-methods": _METHODS, "access-control-max-age": _REMEMBERED}
    answer |= {"access-control-allow-headers": asked} if asked else {}
    return Response(status_code=204, headers=answer)


def _is_own(origin: str, headers: Headers) -> bool:
    place = origin.partition("://")[2].lower()
    return place != "" and place == headers.get("host", "").lower()
