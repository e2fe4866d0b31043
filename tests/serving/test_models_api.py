"""What is served, and what may be asked of it."""

from __future__ import annotations

import pytest

from tests.serving.http_server import assert_error, running


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with running(tmp_path_factory.mktemp("api")) as server:
        yield server


@pytest.fixture(scope="module")
def http(server):
    with server.http() as http:
        yield http


def test_the_schema_of_requests(http):
    schema = http.get("/v1/models/org%2Ftiny/schema").json()
    properties = schema["properties"]
    assert properties["height"]["default"] == 64 and properties["height"]["multipleOf"] == 16
    assert properties["n"]["maximum"] == 10 and properties["n"]["default"] == 1
    assert properties["prompt"]["type"] == ["string", "null"] and "anyOf" not in properties["negative_prompt"]
    assert {entry["x-group"] for entry in properties.values()} == {"basic", "advanced"}
    assert "output_type" not in properties and "size" in properties
    assert_error(http.get("/v1/models/other/schema"), 404, "model")
