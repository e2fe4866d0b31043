"""Whose web pages may use the server."""

from __future__ import annotations

import httpx
import pytest

from tests.serving.http_server import PROMPT, assert_error, running
from tests.serving.wire import (
    GENERATIONS,
    KEY,
    PAGE,
)


@pytest.fixture(scope="module", params=[None, KEY], ids=["no key", "key"])
def site(tmp_path_factory, request):
    """A server that one page's origin may use."""
    more = {"allowed_origins": (PAGE, "http://localhost:3000")}
    with running(tmp_path_factory.mktemp("site"), key=request.param, more=more) as server:
        yield server


PREFLIGHT = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,x-stainless-os"}


@pytest.mark.parametrize("origin", [PAGE, "http://localhost:3000"])
def test_pages_that_may(site, origin):
    with httpx.Client(base_url=site.url) as http:
        for path in (GENERATIONS, "/v1/jobs/x", "/nowhere", "//v1//models/"):
            asked = http.options(path, headers={"origin": origin, **PREFLIGHT})
            assert asked.status_code == 204 and asked.content == b""
            assert asked.headers["access-control-allow-origin"] == origin
            assert asked.headers["access-control-allow-headers"] == "authorization,x-stainless-os"
            assert {"POST", "GET", "DELETE", "HEAD"} == set(asked.headers["access-control-allow-methods"].split(", "))
            assert asked.headers["vary"] == "origin" and "access-control-allow-credentials" not in asked.headers
    with site.http() as http:
        http.headers["origin"] = origin
        answers = [
            http.post(GENERATIONS, json={"prompt": PROMPT}),
            http.post(GENERATIONS, json={"prompt": PROMPT, "stream": True}),
            http.post(GENERATIONS, json={"prompt": "[garbage]"}),
            http.post(GENERATIONS, json={}),
            http.get("/livez"),
            http.head("/v1/models"),
            http.get("/nowhere"),
            http.put("/v1/models"),
            httpx.get(f"{site.url}/v1/models", headers={"origin": origin, "authorization": "Bearer wrong"}),
        ]
        wrong = 200 if site.key is None else 401
        assert [answer.status_code for answer in answers] == [200, 200, 500, 400, 200, 200, 404, 405, wrong]
        for answer in answers:
            assert answer.headers["access-control-allow-origin"] == origin and answer.headers["vary"] == "origin"
            exposed = answer.headers["access-control-expose-headers"].split(", ")
            assert {"x-request-id", "openai-poll-after-ms", "retry-after"} <= set(exposed)


@pytest.mark.parametrize(
    "origin",
    [
        "http://app.example.com",
        "https://app.example.com:8443",
        "https://app.example.com.evil.example",
        "https://evil.example",
        "https://APP.example.com",
        "null",
        "file://",
        "vscode-webview://0a1b",
    ],
)
def test_pages_that_may_not(site, origin):
    with site.http() as http:
        http.headers["origin"] = origin
        asked = http.options(GENERATIONS, headers=PREFLIGHT)
        assert assert_error(asked, 403)["code"] == "foreign_origin"
        for answer in (asked, http.post(GENERATIONS, json={"prompt": PROMPT}), http.get("/livez")):
            assert not [name for name in answer.headers if name.startswith("access-control-")]
            assert answer.headers["vary"] == "origin"
            if site.key is None:
                assert_error(answer, 403)


MALFORMED_ORIGINS = (
    "https://app.example.com/",
    "*",
    "",
    "http://[",
    "http://[::1",
    "http://a:b",
    "://a",
    "h t://a",
)


@pytest.mark.parametrize("origin", [*MALFORMED_ORIGINS, "https://app.example.com, https://evil.example", "a" * 9000])
def test_an_origin_that_is_none(site, origin):
    with site.http() as http:
        http.headers["origin"] = origin
        for answer in (http.options(GENERATIONS, headers=PREFLIGHT), http.get("/livez")):
            assert assert_error(answer, 400)["code"] == "malformed_request"
            assert not [name for name in answer.headers if name.startswith("access-control-")]


def test_every_page_may_where_the_setting_says_so(tmp_path):
    for key in (None, KEY):
        with running(tmp_path / str(key), key=key, more={"allowed_origins": ("*",)}) as server, server.http() as http:
            for origin in (PAGE, "null", "https://other.example"):
                asked = httpx.options(server.url + GENERATIONS, headers={"origin": origin, **PREFLIGHT})
                answer = http.post(GENERATIONS, json={"prompt": PROMPT}, headers={"origin": origin})
                assert (asked.status_code, answer.status_code) == (204, 200)
                for each in (asked, answer):
                    assert each.headers["access-control-allow-origin"] == "*" and "vary" not in each.headers
            assert (httpx.get(f"{server.url}/v1/models", headers={"origin": PAGE}).status_code == 200) == (key is None)


def test_without_the_setting_no_page_may(server, anybody):
    assert_error(anybody.options(GENERATIONS, headers={"origin": PAGE, **PREFLIGHT}), 403)
    assert_error(anybody.options(GENERATIONS), 401)
    own = anybody.options(GENERATIONS, headers={"origin": server.url, **PREFLIGHT})
    assert own.status_code == 204 and "access-control-allow-origin" not in own.headers
    with server.http() as http:
        answer = http.get("/v1/models", headers={"origin": PAGE})
        assert "access-control-allow-origin" not in answer.headers and "vary" not in answer.headers
        assert_error(http.options(GENERATIONS), 405)
