"""What operators ask a server."""

from __future__ import annotations

from tests.serving.http_server import assert_error, running
from tests.serving.stub_engine import IMAGE_SCHEMA


def test_readyz_tells_of_the_disk(tmp_path):
    with running(tmp_path) as server, server.http() as http:
        (tmp_path / "outputs").rename(tmp_path / "gone")
        assert "cannot be written" in assert_error(http.get("/readyz"), 503)["message"]
        (tmp_path / "gone").rename(tmp_path / "outputs")
        assert http.get("/readyz").status_code == 200


def test_the_root_says_what_this_is(server, anybody):
    assert_error(anybody.get("/"), 401)
    with server.http() as http:
        found = http.get("/").json()
        assert (found["name"], found["version"]) == ("safelight", "0.1.0")
        for name in ("api", "models", "ready"):
            assert found[name].startswith(server.url) and http.get(found[name]).status_code == 200
        assert set(found) == {"name", "version", "api", "models", "ready"}
        assert "/org" not in str(found) and IMAGE_SCHEMA.pipeline_name not in str(found)
        other = http.get("/", headers={"host": "[::1]:9"}).json()
        assert other["models"] == "http://[::1]:9/v1/models"
