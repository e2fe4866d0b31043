"""`/v1/models`: what is served, and what may be asked of it."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from safelight.runtime.messages import SCHEMA_KEY, schema_to_wire
from safelight.serving.context import Context, json_response
from safelight.serving.fields import model_fields
from safelight.serving.own_fields import INPUT_REFERENCE, own_fields


def routes(context: Context) -> APIRouter:
    """Return the routes of models. Names hold slashes, which arrive as `/` or as `%2F`."""
    router = APIRouter()

    @router.get("/v1/models")
    async def models(request: Request) -> Response:
        names = context.settings.served_names
        return json_response({"object": "list", "data": [_model(name, context) for name in names]})

    @router.get("/v1/models/{model:path}/schema")
    async def schema(request: Request) -> Response:
        context.check_model(request.path_params["model"])
        return json_response({**request_schema(context), SCHEMA_KEY: schema_to_wire(context.schema())})

    @router.get("/v1/models/{model:path}")
    async def retrieve(request: Request) -> Response:
        name = request.path_params["model"]
        context.check_model(name)
        return json_response(_model(name, context))

    return router


def _model(name: str, context: Context) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": context.started_at, "owned_by": "safelight"}


def request_schema(context: Context) -> dict[str, Any]:
    """Return a JSON Schema (2020-12) of a request's body: the API's fields and the model's, with its defaults."""
    schema = context.schema()
    whole = schema.json_schema()
    properties: dict[str, Any] = {}
    for name, option in model_fields(schema).items():
        properties[name] = {**whole["properties"][name], **option.json_schema()}
        if option.kind == "string":
            properties[name].pop("anyOf", None)  # of texts, of which a request here has one
    defaults = {name: entry["default"] for name, entry in properties.items() if "default" in entry}
    defaults["response_format"] = context.settings.response_format
    for name, option in own_fields(schema, context.limits).items():
        properties[name] = option.json_schema() | ({"default": defaults[name]} if name in defaults else {})
    required = [name for name in whole["required"] if name == "prompt" or INPUT_REFERENCE not in properties]
    return {
        **whole,
        "properties": {name: _nullable(entry) for name, entry in properties.items()},
        "required": required,
    }


def _nullable(entry: dict[str, Any]) -> dict[str, Any]:
    """Null is as good as not given."""
    if "anyOf" in entry:
        return {**entry, "anyOf": [*entry["anyOf"], {"type": "null"}]}
    nullable = {**entry, "type": [entry["type"], "null"]}
    return nullable | ({"enum": [*entry["enum"], None]} if "enum" in entry else {})
