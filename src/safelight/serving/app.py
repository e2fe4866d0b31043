"""The application: routes, errors, and what surrounds them. Imports no torch."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from safelight.errors import SafelightError
from safelight.runtime.client import EngineClient
from safelight.serving import health, images, jobs_api, models_api, openapi, videos
from safelight.serving.auth import Envelope, KeyCheck
from safelight.serving.context import Context, Settings
from safelight.serving.errors import GONE, error_response, from_status
from safelight.serving.job_manager import JobManager


def create_app(engine: EngineClient, jobs: JobManager, settings: Settings) -> FastAPI:
    """Return the HTTP API of one engine.

    Its lifespan starts the job manager, and closes it with `drain_seconds` to go. The engine's life is the caller's.
    It must run under `safelight.serving.http.uvicorn_config`, which has the deadlines.

    Args:
        engine: where requests run.
        jobs: not started yet.
        settings: names, key and bounds.

    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await jobs.start()
        try:
            yield
        finally:
            await jobs.close(settings.drain_seconds)
            context.close()

    context = Context(engine, jobs, settings)
    app = FastAPI(
        title="Safelight",
        lifespan=lifespan,
        openapi_url=None,  # it is made from our own table of fields
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        middleware=[Middleware(Envelope), Middleware(KeyCheck, key=settings.api_key)],
    )
    for part in (health, images, videos, jobs_api, models_api, openapi):
        app.include_router(part.routes(context))
    _answer_errors(app, context)
    return app


def _answer_errors(app: FastAPI, context: Context) -> None:
    """Answer every error in the API's form, and count it."""

    def ended(request: Request, status: int) -> None:
        task = request.scope["state"].get("task")
        if task is not None:
            context.metrics.ended(task, status)

    def answer(request: Request, error: SafelightError, headers: dict[str, str] | None = None) -> Response:
        ended(request, error.status)
        context.metrics.answered(error)
        return error_response(error, headers)

    @app.exception_handler(SafelightError)
    async def known(request: Request, error: SafelightError) -> Response:
        return answer(request, error)

    @app.exception_handler(HTTPException)
    async def routing(request: Request, error: HTTPException) -> Response:
        headers = dict(error.headers or {})
        return answer(request, from_status(error.status_code, headers.get("Allow", "")), headers)

    @app.exception_handler(ClientDisconnect)
    async def gone(request: Request, error: ClientDisconnect) -> Response:
        ended(request, GONE)
        return Response(status_code=GONE)
