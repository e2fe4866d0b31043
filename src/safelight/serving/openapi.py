"""`/openapi.json`: what the API takes and answers, made from the tables that the routes check with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from safelight.serving.addresses import EXPIRES, SIGNATURE
from safelight.serving.context import Context, json_response
from safelight.serving.models_api import request_schema
from safelight.serving.own_fields import IMAGES
from safelight.version import __version__

Document = dict[str, Any]
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": "string"},
            },
        }
    },
}
_JSON, _FORM, _EVENTS = "application/json", "multipart/form-data", "text/event-stream"
_BODY_ERRORS = (400, 403, 404, 408, 413, 415, 429, 500, 503, 504, 507)
_FILE_ERRORS = (400, 403, 404, 409, 416)
_READ = {"200": [_JSON]}
_CREATED = {"200": [_JSON, _EVENTS], "202": [_JSON]}
_FILE = {"200": ["*/*"], "206": ["*/*"]}
_TEXT = {"type": "string"}
_QUERIES: dict[str, Document] = {
    "after": _TEXT,
    "limit": {"type": "integer", "minimum": 1, "maximum": 100},
    "order": {"enum": ["asc", "desc"]},
    "variant": {"enum": ["video", "thumbnail", "spritesheet"]},
    "index": {"type": "integer", "minimum": 0},
    EXPIRES: _TEXT,
    SIGNATURE: _TEXT,
}
_PAGE = ("after", "limit", "order")


def routes(context: Context) -> APIRouter:
    """Return the route of the document."""
    router = APIRouter()

    @router.get("/openapi.json")
    async def openapi(request: Request) -> Response:
        return json_response(document(context))

    return router


def document(context: Context) -> Document:
    """Return an OpenAPI 3.1 document; what a request may hold is known once the model is loaded."""
    is_loaded = context.engine.schema is not None
    paths = _paths(request_schema(context) if is_loaded else {"type": "object", "required": ["prompt"]})
    for path, operations in paths.items():
        for operation in operations.values():
            names = [piece[1:-1] for piece in path.split("/") if piece.startswith("{")]
            operation["parameters"] += [_parameter(name, _TEXT, "path") for name in names]
    return {
        "openapi": "3.1.0",
        "info": {"title": "Safelight", "version": __version__},
        "paths": paths,
        "components": {
            "schemas": {"Error": _ERROR},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"key": []}] if context.settings.keys else [],
    }


def _paths(body: Document) -> dict[str, dict[str, Document]]:
    """Return what each route takes and answers; `body` is that of a generation."""
    required = [name for name in body["required"] if name != "image"]
    edit = {**body, "required": required, "anyOf": [{"required": [name]} for name in ("image", IMAGES)]}
    video = _operation("Begin a video", (*_BODY_ERRORS, 409), _READ, body, (_FORM, _JSON))
    return {
        "/v1/images/generations": {"post": _operation("Make pictures", _BODY_ERRORS, _CREATED, body, (_JSON,))},
        "/v1/images/edits": {"post": _operation("Change pictures", _BODY_ERRORS, _CREATED, edit, (_FORM, _JSON))},
        "/v1/videos": {"post": video, "get": _operation("List videos", (400,), queries=_PAGE)},
        "/v1/videos/{video_id}": {
            "get": _operation("Say how far a video is", (404,)),
            "delete": _operation("Stop and remove a video", (404, 507)),
        },
        "/v1/videos/{video_id}/content": {
            "get": _operation("Download a video", _FILE_ERRORS, _FILE, queries=("variant",))
        },
        "/v1/videos/{video_id}/remix": {
            "post": {**video, "summary": "Make a video again, otherwise", "parameters": []}
        },
        "/v1/jobs": {"get": _operation("List jobs", (400,), queries=_PAGE)},
        "/v1/jobs/{job_id}": {
            "get": _operation("Say how far a job is", (404,)),
            "delete": _operation("Cancel a job", (404, 507)),
        },
        "/v1/jobs/{job_id}/events": {"get": _operation("Follow a job", (404,), {"200": [_EVENTS]})},
        "/v1/jobs/{job_id}/content": {
            "get": _operation(
                "Download an output", _FILE_ERRORS, _FILE, queries=("variant", "index", EXPIRES, SIGNATURE)
            )
        },
        "/v1/models": {"get": _operation("List the served names")},
        "/v1/models/{model}": {"get": _operation("Describe a model", (404,))},
        "/v1/models/{model}/schema": {"get": _operation("Say what may be asked of a model", (404, 503))},
        "/": {"get": _operation("Say what this is")},
        "/livez": {"get": {**_operation("Say that the server lives"), "security": []}},
        "/readyz": {"get": _operation("Say whether requests are taken", (503,))},
        "/metrics": {"get": _operation("Tell Prometheus", answers={"200": ["text/plain"]})},
        "/openapi.json": {"get": _operation("This document")},
    }


def _operation(
    summary: str,
    errors: Sequence[int] = (),
    answers: Mapping[str, Sequence[str]] = _READ,
    body: Document | None = None,
    takes: Sequence[str] = (),
    queries: Sequence[str] = (),
) -> Document:
    """Describe what is done with a path; `answers` are the media types of each status, and `takes` those of a body."""
    error = {"description": "An error.", "content": {_JSON: {"schema": {"$ref": "#/components/schemas/Error"}}}}
    responses = {
        status: {"description": "Done.", "content": {kind: {} for kind in kinds}} for status, kinds in answers.items()
    }
    responses |= {str(status): error for status in (401, *errors)}
    parameters = [_parameter(name, _QUERIES[name], "query") for name in queries]
    found: Document = {"summary": summary, "responses": responses, "parameters": parameters}
    if body is not None:
        found["requestBody"] = {"required": True, "content": {kind: {"schema": body} for kind in takes}}
    return found


def _parameter(name: str, schema: Document, place: str) -> Document:
    return {"name": name, "in": place, "required": place == "path", "schema": schema}
