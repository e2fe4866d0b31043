"""The document of the API."""

from __future__ import annotations

import pytest

from tests.serving.http_server import running
from tests.serving.wire import (
    flat,
)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with running(tmp_path_factory.mktemp("api")) as server:
        yield server


@pytest.fixture(scope="module")
def http(server):
    with server.http() as http:
        yield http


def test_openapi_names_every_route_and_no_other(server, http):
    document = http.get("/openapi.json").json()
    told = {(method.upper(), path) for path, item in document["paths"].items() for method in item}
    routes = flat(server.server.config.loaded_app)
    there = {(method, route.path.replace(":path", "")) for route in routes for method in route.methods}
    assert told == there
    for path, one_of in {"generations": None, "edits": [{"required": ["image"]}, {"required": ["images"]}]}.items():
        body = document["paths"][f"/v1/images/{path}"]["post"]["requestBody"]["content"]["application/json"]
        assert body["schema"]["required"] == ["prompt"] and body["schema"].get("anyOf") == one_of
    for item in document["paths"].values():
        for operation in item.values():
            named = {parameter["name"] for parameter in operation["parameters"] if parameter["in"] == "path"}
            assert all(parameter["required"] for parameter in operation["parameters"] if parameter["name"] in named)
