"""The application: routes, errors, and what surrounds them. Imports no torch."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from http import HTTPStatus

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match

from safelight.encoded import give_back_large_blocks
from safelight.errors import SafelightError
from safelight.runtime.client import EngineClient
from safelight.serving import health, images_api, jobs_api, models_api, openapi, videos_api
from safelight.serving.auth import KeyCheck
from safelight.serving.context import Context, Settings
from safelight.serving.http.envelope import Envelope
from safelight.serving.http.errors import MethodError, NotFoundError
from safelight.serving.http.hosts import Hosts
from safelight.serving.http.origins import Origins
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

    context, origins = Context(engine, jobs, settings), Origins(settings.allowed_origins)
    hosts = Hosts(settings.allowed_hosts)
    app = FastAPI(
        title="Safelight",
        lifespan=lifespan,
        openapi_url=None,  # it is made from our own table of fields
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        middleware=[
            Middleware(Envelope, origins=origins, metrics=context.metrics),
            Middleware(KeyCheck, keys=settings.keys, origins=origins, hosts=hosts, addresses=context.addresses),
        ],
    )
    for part in (health, images_api, videos_api, jobs_api, models_api, openapi):
        app.include_router(part.routes(context))

    @app.exception_handler(HTTPException)
    async def routing(request: Request, error: HTTPException) -> Response:
        """Raise what the router refuses by itself as the API says it."""
        if error.status_code == HTTPStatus.NOT_FOUND:
            raise NotFoundError("there is no such route")
        if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
            raise MethodError(_allowed(app, request))
        raise SafelightError(f"the router answers {error.status_code}")

    return app


def _allowed(app: FastAPI, request: Request) -> str:
    """Return the methods that a path takes, over all routes: the router knows those of the first that fits."""
    scopes = {method: {**request.scope, "method": method} for method in ("GET", "POST", "DELETE")}
    found = [m for m, scope in scopes.items() if any(r.matches(scope)[0] is Match.FULL for r in app.router.routes)]
    return ", ".join(["HEAD", *found] if "GET" in found else found)
