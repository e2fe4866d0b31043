"""`/openapi.json`: what the API takes and answers, made from the tables that the routes check with."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from safelight.serving.addresses import EXPIRES, SIGNATURE
from safelight.serving.context import Context, json_response
from safelight.serving.fields import IMAGES
from safelight.serving.models_api import request_schema
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
_BODY_ERRORS = (400, 403, 404, 408, 413, 415, 429, 500, 503, 504, 507)
_JSON, _FORM, _EVENTS = "application/json", "multipart/form-data", "text/event-stream"
_VIDEO_ID, _JOB_ID = "video_id", "job_id"


def routes(context: Context) -> APIRouter:
    """Return the route of the document."""
    router = APIRouter()

    @router.get("/openapi.json")
    async def openapi(request: Request) -> Response:
        return json_response(document(context))

    return router


def document(context: Context) -> Document:
    """Return an OpenAPI 3.1 document; what a request may hold is known once the model is loaded."""
    body: Document = {"type": "object", "required": ["prompt"]}
    if context.engine.schema is not None:
        body = request_schema(context)
    required = [name for name in body["required"] if name != "image"]
    edit = {**body, "required": required, "anyOf": [{"required": [name]} for name in ("image", IMAGES)]}
    created = {"200": [_JSON, _EVENTS], "202": [_JSON]}
    list_query = [
        _query("after", {"type": "string"}),
        _query("limit", {"type": "integer", "minimum": 1, "maximum": 100}),
    ]
    list_query.append(_query("order", {"enum": ["asc", "desc"]}))
    variant = _query("variant", {"enum": ["video", "thumbnail", "spritesheet"]})
    index = _query("index", {"type": "integer", "minimum": 0})
    content, signed = (
        {"200": ["*/*"], "206": ["*/*"]},
        [_query(name, {"type": "string"}) for name in (EXPIRES, SIGNATURE)],
    )
    ok = {"200": [_JSON]}
    paths: dict[str, dict[str, Document]] = {
        "/v1/images/generations": {"post": _operation("Make pictures", created, _BODY_ERRORS, body, [_JSON])},
        "/v1/images/edits": {"post": _operation("Change pictures", created, _BODY_ERRORS, edit, [_FORM, _JSON])},
        "/v1/videos": {
            "post": _operation("Begin a video", ok, (*_BODY_ERRORS, 409), body, [_FORM, _JSON]),
            "get": _operation("List videos", ok, (400,), parameters=list_query),
        },
        "/v1/videos/{video_id}": {
            "get": _operation("Say how far a video is", ok, (404,)),
            "delete": _operation("Stop and remove a video", ok, (404, 507)),
        },
        "/v1/videos/{video_id}/content": {
            "get": _operation("Download a video", content, (400, 403, 404, 409, 416), parameters=[variant])
        },
        "/v1/videos/{video_id}/remix": {
            "post": _operation("Make a video again, otherwise", ok, (*_BODY_ERRORS, 409), body, [_FORM, _JSON])
        },
        "/v1/jobs": {"get": _operation("List jobs", ok, (400,), parameters=list_query)},
        "/v1/jobs/{job_id}": {
            "get": _operation("Say how far a job is", ok, (404,)),
            "delete": _operation("Cancel a job", ok, (404, 507)),
        },
        "/v1/jobs/{job_id}/events": {"get": _operation("Follow a job", {"200": [_EVENTS]}, (404,))},
        "/v1/jobs/{job_id}/content": {
            "get": _operation(
                "Download an output", content, (400, 403, 404, 409, 416), parameters=[variant, index, *signed]
            )
        },
        "/v1/models": {"get": _operation("List the served names", ok, ())},
        "/v1/models/{model}": {"get": _operation("Describe a model", ok, (404,))},
        "/v1/models/{model}/schema": {"get": _operation("Say what may be asked of a model", ok, (404, 503))},
        "/": {"get": _operation("Say what this is", ok, ())},
        "/livez": {"get": {**_operation("Say that the server lives", ok, ()), "security": []}},
        "/readyz": {"get": _operation("Say whether requests are taken", ok, (503,))},
        "/metrics": {"get": _operation("Tell Prometheus", {"200": ["text/plain"]}, ())},
        "/openapi.json": {"get": _operation("This document", ok, ())},
    }
    for path, operations in paths.items():
        for operation in operations.values():
            names = [piece[1:-1] for piece in path.split("/") if piece.startswith("{")]
            operation["parameters"] += [_parameter(name, {"type": "string"}, "path") for name in names]
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


def _operation(
    summary: str,
    answers: dict[str, list[str]],
    errors: tuple[int, ...],
    body: Document | None = None,
    takes: list[str] | None = None,
    parameters: list[Document] | None = None,
) -> Document:
    error = {"description": "An error.", "content": {_JSON: {"schema": {"$ref": "#/components/schemas/Error"}}}}
    responses = {
        status: {"description": "Done.", "content": {t: {} for t in types}} for status, types in answers.items()
    }
    responses |= {str(status): error for status in (401, *errors)}
    found: Document = {"summary": summary, "responses": responses, "parameters": [*(parameters or [])]}
    if body is not None:
        found["requestBody"] = {"required": True, "content": {kind: {"schema": body} for kind in takes or []}}
    return found


def _query(name: str, schema: Document) -> Document:
    return _parameter(name, schema, "query")


def _parameter(name: str, schema: Document, place: str) -> Document:
    return {"name": name, "in": place, "required": place == "path", "schema": schema}
