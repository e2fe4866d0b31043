"""The one check of the key: which routes need it, how it is said, and whose pages do without."""

from __future__ import annotations

import re

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.serving.http_server import PROMPT, assert_error, running
from tests.serving.wire import (
    GENERATIONS,
    KEY,
    flat,
)


def test_every_route_but_livez_needs_the_key(tmp_path):
    """Walk all routes there are, with no key, a wrong one, and one of another form."""
    with running(tmp_path, key="sk-right") as server, httpx.Client(base_url=server.url) as http:
        app = server.server.config.loaded_app
        routes = [(method, route.path) for route in flat(app) for method in sorted(route.methods)]
        assert len(routes) > 15
        wrong = [
            "",
            "Bearer",
            "Bearer sk-wrong",
            "Bearer sk-right2",
            "Bearersk-right",
            "Token sk-right",
            "sk-right",
            "Basic c2stcmlnaHQ=",
        ]
        for method, path in [*routes, ("GET", "/nowhere"), ("PATCH", "/v1/videos"), ("GET", "/%2Flivez")]:
            path = re.sub(r"\{[^}]*\}", "x", path)
            for key in wrong:
                answer = http.request(method, path, headers={"authorization": key} if key else {})
                if path == "/livez":
                    assert answer.status_code == 200
                else:
                    assert_error(answer, 401)
                    assert answer.headers["www-authenticate"] == "Bearer"
        with server.http() as right:
            assert right.get("/v1/models").status_code == 200
            upgrade = {"connection": "upgrade", "upgrade": "websocket", "sec-websocket-version": "13"}
            assert right.get("/v1/models", headers=upgrade).status_code == 200  # there are no websockets


def test_a_wrong_key_is_refused_before_the_body_is_read(tmp_path):
    with running(tmp_path, key="sk-right") as server:
        answer = server.raw(b"POST /v1/videos HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1000000\r\n\r\n")
        assert answer[0] == 401


@pytest.mark.parametrize(
    ("origin", "status"), [("http://evil.example", 403), ("null", 403), ("http://{host}", 200), (None, 200)]
)
def test_web_pages_of_others_are_not_answered_without_a_key(tmp_path, origin, status):
    with running(tmp_path) as server, server.http() as http:
        host = server.url.removeprefix("http://")
        headers = {} if origin is None else {"origin": origin.format(host=host)}
        answer = http.post(GENERATIONS, json={"prompt": PROMPT}, headers=headers)
        assert answer.status_code == status
        if status == 403:
            assert_error(answer, 403)
    with running(tmp_path / "key", key="a key of many characters") as server, server.http() as http:
        answer = http.post(GENERATIONS, json={"prompt": PROMPT}, headers={"origin": "http://evil.example"})
        assert answer.status_code == 200, "a page that knows the key may"


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER", "bEaReR", "Bearer ", "bearer  "])
def test_the_scheme_in_any_case(server, anybody, scheme):
    assert anybody.get("/v1/models", headers={"authorization": f"{scheme} {KEY}"}).status_code == 200
    for wrong in (KEY.upper(), KEY[:-1], f"{KEY}x", "x", f"Bearer {KEY}"):
        assert_error(anybody.get("/v1/models", headers={"authorization": f"{scheme} {wrong}"}), 401)


PIECES = st.sampled_from(
    ["/", "//", "%2F", "%2f", ".", "..", "livez", "v1", "models", "metrics", "%00", ";x", "\\", "%5c"]
)


@settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(pieces=st.lists(PIECES, max_size=8))
def test_no_spelling_of_a_path_leads_past_the_key(server, pieces):
    target = "/" + "".join(pieces)
    answer = server.raw(f"GET {target} HTTP/1.1\r\nhost: localhost\r\n\r\n".encode())
    is_live = re.fullmatch("/+livez/*", target) is not None
    assert answer[0] == (200 if is_live else 401), target
