"""`/`, `/livez`, `/readyz` and `/metrics`."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from safelight.errors import NotReadyError, StorageError
from safelight.serving.auth import LIVE_PATH
from safelight.serving.context import Context, json_response
from safelight.serving.metrics import CONTENT_TYPE
from safelight.version import __version__

_DISK_SECONDS = 2.0


def routes(context: Context) -> APIRouter:
    """Return the routes of operations."""
    router = APIRouter()

    @router.get("/")
    async def root(request: Request) -> Response:
        base = context.base_url(request)
        found = {"api": "/openapi.json", "models": "/v1/models", "ready": "/readyz"}
        where = {name: f"{base}{path}" for name, path in found.items()}
        return json_response({"name": "safelight", "version": __version__, **where})

    @router.get(LIVE_PATH)
    async def livez(request: Request) -> Response:
        return json_response({"status": "ok"})

    @router.get("/readyz")
    async def readyz(request: Request) -> Response:
        if context.engine.state != "ready":
            raise NotReadyError(f"the engine is not ready: {context.engine.state}")
        try:
            await asyncio.wait_for(asyncio.to_thread(context.jobs.outputs.check_writable), _DISK_SECONDS)
        except (OSError, TimeoutError) as error:
            raise NotReadyError("the outputs directory cannot be written") from error
        try:
            await asyncio.wait_for(context.jobs.store.check_writable(), _DISK_SECONDS)
        except (StorageError, TimeoutError) as error:
            raise NotReadyError("the jobs' database cannot be written") from error
        return json_response({"status": "ready"})

    @router.get("/metrics")
    async def metrics(request: Request) -> Response:
        return Response(context.metrics.exposition(), media_type=CONTENT_TYPE)

    return router
