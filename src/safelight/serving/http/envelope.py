"""What surrounds every request: one form of its path, its id, and an answer whatever happens.

Plain ASGI, so that streams pass.
"""

from __future__ import annotations

import contextlib
import logging
import re
import secrets
from urllib.parse import unquote

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from safelight.serving.http.errors import GONE, answerable, error_body, error_headers
from safelight.serving.http.hosts import check_headers
from safelight.serving.http.origins import Origins
from safelight.serving.metrics import Metrics

logger = logging.getLogger(__name__)

_AUTHORITY = re.compile(rb"https?://([^/]*)", re.IGNORECASE)
"""Of a target in absolute form, as some proxies send it (RFC 9112, 3.2.2)."""
_SLASHES = re.compile(rb"//+")


class Envelope:
    """Give every response an `x-request-id`, and every error the API's form.

    What is behind it raises why a request is not answered. Of those that are let in, the errors are counted too.

    What is behind it, the check of the key among it, sees one path: slashes that are doubled, or at the end, are left
    out (an escaped `%2F` is no separator). HEAD is GET whose answer ends after its headers.

    What a request registers with `state["at_end"]`, an `ExitStack`, is done when it has been answered.

    Args:
        app: what is behind it.
        origins: whose pages may read answers.
        metrics: count how requests ended.

    """

    def __init__(self, app: ASGIApp, origins: Origins, metrics: Metrics) -> None:
        self._app, self._origins, self._metrics = app, origins, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run what is behind it; nothing that it raises gets out, so that its connection stays usable."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id, started = new_request_id(), False
        is_head = scope["method"] == "HEAD"

        async def named(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                headers.update(self._origins.answer_headers(Headers(scope=scope)))
                await send(message)
                if is_head:
                    await send({"type": "http.response.body", "body": b"", "more_body": False})
            elif not is_head:
                await send(message)

        with contextlib.ExitStack() as at_end:
            state = {**scope.get("state", {}), "at_end": at_end, "request_id": request_id}
            try:
                plain = {**scope, **_plain_path(scope), "method": "GET" if is_head else scope["method"], "state": state}
                check_headers(Headers(scope=plain))
                await self._app(plain, receive, named)
            except Exception as error:  # the boundary of a request
                if started:
                    logger.exception("request %s failed", request_id)
                    raise  # what was promised cannot be sent any more: the server ends the connection
                if isinstance(error, ClientDisconnect):
                    self._metrics.ended(state.get("task"), GONE)
                    response = Response(status_code=GONE)
                else:
                    error = answerable(error, request_id)  # it leads to this frame, and its name ends here
                    if "principal" in state:
                        self._metrics.failed(state.get("task"), error)
                    response = JSONResponse(error_body(error), error.status, error_headers(error))
                await response(scope, receive, named)


def _plain_path(scope: Scope) -> Scope:
    """Return what a scope has otherwise: its path, and its `Host` where the target names one, which goes before."""
    authority = _AUTHORITY.match(scope["raw_path"])
    raw = _SLASHES.sub(b"/", scope["raw_path"][authority.end() if authority else 0 :])
    raw = raw.rstrip(b"/") or b"/"
    found: Scope = {} if raw == scope["raw_path"] else {"raw_path": raw, "path": unquote(raw.decode("ascii"))}
    if authority is not None:
        others = [pair for pair in scope["headers"] if pair[0] != b"host"]
        found["headers"] = [(b"host", authority[1].lower()), *others]
    return found


def new_request_id() -> str:
    """Return a fresh id, which says nothing."""
    return f"req_{secrets.token_hex(16)}"
