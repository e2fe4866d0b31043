"""The application: routes, errors, and what surrounds them. Imports no torch."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from http import HTTPStatus

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Match

from safelight.encoded import give_back_large_blocks
from safelight.errors import SafelightError
from safelight.runtime.client import EngineClient
from safelight.serving import health, images_api, jobs_api, models_api, openapi, videos_api
from safelight.serving.auth import KeyCheck
from safelight.serving.context import Context, Settings
from safelight.serving.http.envelope import Envelope
from safelight.serving.http.errors import GONE, error_response, from_status
from safelight.serving.http.hosts import Hosts
from safelight.serving.http.origins import Origins, Preflight
from safelight.serving.jobs.manager import JobManager


def create_app(engine: EngineClient, jobs: JobManager, settings: Settings) -> FastAPI:
    """Return the HTTP API of one engine.

    Its lifespan tells the allocator to keep no large blocks, starts the job manager, and closes that with
    `closing_seconds` to go. The engine's life is the caller's.
    It must run under `safelight.serving.http.protocol.uvicorn_config`, which has the deadlines.

    Args:
        engine: where requests run.
        jobs: not started yet.
        settings: names, keys and bounds.

    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        give_back_large_blocks()
        await jobs.start()
        try:
            yield
        finally:
            await jobs.close(settings.closing_seconds)
            context.close()

    context, origins, hosts = (
        Context(engine, jobs, settings),
        Origins(settings.allowed_origins),
        Hosts(settings.allowed_hosts),
    )
    app = FastAPI(
        title="Safelight",
        lifespan=lifespan,
        openapi_url=None,  # it is made from our own table of fields
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        middleware=[
            Middleware(Envelope, origins=origins),
            Middleware(Preflight, origins=origins, hosts=None if settings.keys else hosts),
            Middleware(
                KeyCheck,
                keys=settings.keys,
                origins=origins,
                hosts=hosts,
                addresses=context.addresses,
            ),
        ],
    )
    for part in (health, images_api, videos_api, jobs_api, models_api, openapi):
        app.include_router(part.routes(context))
    _answer_errors(app, context)
    return app


def _answer_errors(app: FastAPI, context: Context) -> None:
    """Answer every error in the API's form, and count it."""

    def ended(request: Request, status: int) -> None:
        task = request.scope["state"].get("task")
        if task is not None:
            context.metrics.ended(task, status)

    @app.exception_handler(SafelightError)
    async def answer(request: Request, error: SafelightError, headers: dict[str, str] | None = None) -> Response:
        ended(request, error.status)
        context.answered(request, error)
        return error_response(error, headers)

    @app.exception_handler(HTTPException)
    async def routing(request: Request, error: HTTPException) -> Response:
        allowed = _allowed(app, request)
        headers = {"allow": allowed} if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED else {}
        return await answer(request, from_status(error.status_code, allowed), headers)

    @app.exception_handler(ClientDisconnect)
    async def gone(request: Request, error: ClientDisconnect) -> Response:
        ended(request, GONE)
        return Response(status_code=GONE)


def _allowed(app: FastAPI, request: Request) -> str:
    """Return the methods that a path takes, over all routes: the router knows those of the first that fits."""
    scopes = {method: {**request.scope, "method": method} for method in ("GET", "POST", "DELETE")}
    found = [m for m, scope in scopes.items() if any(r.matches(scope)[0] is Match.FULL for r in app.router.routes)]
    return ", ".join(["HEAD", *found] if "GET" in found else found)
