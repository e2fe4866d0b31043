"""A server without a key and the browsers of its machine: other names, other sites, and what a page sends unasked."""

from __future__ import annotations

import asyncio
import itertools
import time

import httpx
import pytest

from safelight.errors import InvalidParameterError
from safelight.serving.addresses import Addresses
from safelight.serving.auth import KeyCheck
from safelight.serving.http.hosts import Hosts, host_name
from safelight.serving.http.origins import Origins
from safelight.serving.http_args import HTTPArgs
from tests.serving.http_server import PROMPT, assert_error, running
from tests.serving.stub_engine import EDIT_SCHEMA, IMAGE_SCHEMA, VIDEO_SCHEMA

KEY = "0123456789abcdef0123456789abcdef"
OURS = ["localhost", "LOCALHOST", "localhost.", "app.localhost", "127.0.0.1", "127.8.9.1", "[::1]", "told.example"]
OTHERS = [
    *("evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "notlocalhost", "told.example.evil.example"),
    *("0.0.0.0", "10.0.0.1", "[::]", "[fe80::1]", "2130706433", "0x7f.1", "xn--lcalhost-tkb", "sub.told.example"),
]
NO_HOSTS = [
    "[",
    "[::1",
    "[::1]a",
    "a]",
    "a b",
    "a:b",
    "a:1:2",
    "user@localhost",
    "a/b",
    "[localhost]",
    "a" * 400,
    "a:123456",
]
PORTS = ["", ":80", ":8000", ":"]
PATHS = ["/", "/livez", "/readyz", "/metrics", "/openapi.json", "/v1/models", "/v1/videos", "/nowhere"]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with running(tmp_path_factory.mktemp("open"), more={"allowed_hosts": ("told.example",)}) as server:
        yield server


@pytest.fixture(scope="module")
def locked(tmp_path_factory):
    with running(tmp_path_factory.mktemp("locked"), key=KEY) as server:
        yield server


def asked(server, host, path="/livez", more=""):
    key = f"authorization: Bearer {KEY}\r\n" if server.key else ""
    return server.raw(f"GET {path} HTTP/1.1\r\nhost: {host}\r\n{key}{more}\r\n".encode())


@pytest.mark.parametrize(("host", "port"), itertools.product(OURS, PORTS))
def test_names_of_this_machine(server, locked, host, port):
    assert asked(server, host + port)[0] == asked(locked, host + port)[0] == 200


@pytest.mark.parametrize("host", OTHERS)
def test_other_names(server, locked, host):
    for path in PATHS:
        status, _, body = asked(server, f"{host}:{server.port}", path)
        assert status == 403 and body["error"]["code"] == "foreign_host"
    assert asked(locked, host)[0] == 200


@pytest.mark.parametrize("host", NO_HOSTS)
def test_what_is_no_host(server, locked, host):
    for each in (server, locked):
        for path in ("/", "/livez", "/v1/models"):  # some answers hold addresses, which are made of it
            status, _, body = asked(each, host, path)
            assert status == 400 and body["error"]["code"] == "malformed_request"


def test_a_rebound_page_starts_nothing(server):
    """Its origin is the server's own, since both are named by it."""
    for host in ("evil.example", f"evil.example:{server.port}"):
        for headers in ({}, {"origin": f"http://{host}", "sec-fetch-site": "same-origin"}):
            with server.http() as http:
                before = len(server.engine.submitted)
                answer = http.post("/v1/images/generations", json={"prompt": PROMPT}, headers={"host": host, **headers})
                assert assert_error(answer, 403)["code"] == "foreign_host" and len(server.engine.submitted) == before
    assert asked(server, "", "http://evil.example/livez")[0] == 403
    assert asked(server, "localhost", "http://evil.example/livez")[0] == 403, "the target's authority is what counts"


TARGETS = [
    "http://localhost/livez",
    "http://127.0.0.1:{port}/livez?a=b",
    "HTTP://LocalHost:{port}//livez/",
    "http://[::1]/livez",
]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("host", ["localhost", "", "evil.example", "["])
def test_a_target_in_absolute_form(server, target, host):
    """Its authority goes before the header (RFC 9112, 3.2.2)."""
    assert asked(server, host, target.format(port=server.port))[::2] == (200, {"status": "ok"})


def test_absolute_targets_of_every_kind(server, locked):
    for each in (server, locked):
        base = f"http://localhost:{each.port}"
        status, _, found = asked(each, "", base)
        assert status == 200 and found["api"] == f"{base}/openapi.json"
        assert asked(each, "", f"{base}/v1/models/org%2Ftiny")[2]["id"] == "org/tiny"
        assert asked(each, "", f"{base}/v1/videos?limit=1")[0] == 200
        assert asked(each, "", f"{base}/v1/videos?limit=0")[0] == 400


CROSS = {
    "a picture": {"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors", "sec-fetch-dest": "image"},
    "a link": {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"},
    "a form": {"origin": "https://evil.example", "sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"},
    "a form of an older browser": {"origin": "https://evil.example"},
    "a form in a sandbox": {"origin": "null"},
    "a form in a sandbox, marked": {"origin": "null", "sec-fetch-site": "cross-site"},
    "a form that says it is ours": {"origin": "http://localhost", "sec-fetch-site": "cross-site"},
    "another port": {"origin": "http://localhost:3000", "sec-fetch-site": "same-site"},
}
STARTS = {
    "pictures": ("/v1/images/generations", IMAGE_SCHEMA),
    "edits": ("/v1/images/edits", EDIT_SCHEMA),
    "videos": ("/v1/videos", VIDEO_SCHEMA),
}
SIMPLE = {
    "text/plain": b'{"prompt": "x"}',
    "application/x-www-form-urlencoded": b"prompt=x",
    "multipart/form-data; boundary=b": b'--b\r\ncontent-disposition: form-data; name="prompt"\r\n\r\nx\r\n--b--\r\n',
    "application/json": b'{"prompt": "x"}',
    "": b'{"prompt": "x"}',
}


@pytest.mark.parametrize("start", STARTS)
def test_a_page_of_another_site_starts_nothing(tmp_path, start):
    path, schema = STARTS[start]
    with running(tmp_path, schema) as server, server.http() as http:
        for headers, (media_type, body) in itertools.product(CROSS.values(), SIMPLE.items()):
            typed = {"content-type": media_type} if media_type else {}
            answer = http.post(path, content=body, headers={**headers, **typed, "host": "localhost"})
            assert assert_error(answer, 403)["code"] == "foreign_origin"
            for method in ("GET", "DELETE", "HEAD"):
                refused = http.request(method, f"{path}/x", headers={**headers, "host": "localhost"})
                assert refused.status_code == 403
        for media_type in ("text/plain", "application/x-www-form-urlencoded", ""):
            typed = {"content-type": media_type} if media_type else {}
            assert_error(http.post(path, content=SIMPLE[media_type], headers=typed), 415)
        assert server.engine.submitted == []
        for site in ("same-origin", "same-site", "none"):
            assert http.get("/livez", headers={"sec-fetch-site": site}).status_code == 200


TWICE = [
    ("origin", "http://localhost", "https://evil.example"),
    ("sec-fetch-site", "none", "cross-site"),
    ("content-type", "application/json", "text/plain"),
]


@pytest.mark.parametrize(("name", "first", "second"), TWICE)
def test_what_lets_a_request_in_is_said_once(server, locked, name, first, second):
    """Whichever of the two counts, somebody else could believe the other."""
    for each, values in itertools.product((server, locked), ((first, second), (second, first))):
        more = "".join(f"{name}: {value}\r\n" for value in values)
        assert asked(each, "localhost", more=more)[2]["error"]["code"] == "malformed_request"
    joined = asked(server, "localhost", more=f"{name}: {first}, {second}\r\n")
    assert joined[0] == {"origin": 400, "sec-fetch-site": 403, "content-type": 200}[name]


def test_a_preflight_is_for_our_names_too(server, locked):
    """A rebound page is told nothing of what it may; where there is a key, names do not matter."""
    with server.http() as http, httpx.Client(base_url=locked.url) as anybody:
        headers = {"host": "evil.example", "origin": "http://evil.example", "access-control-request-method": "POST"}
        assert assert_error(http.options("/v1/videos", headers=headers), 403)["code"] == "foreign_host"
        assert anybody.options("/v1/videos", headers=headers).status_code == 204
        ours = {**headers, "host": "told.example", "origin": "http://told.example"}
        assert http.options("/v1/videos", headers=ours).status_code == 204


def test_pages_that_the_setting_names_are_let_in(tmp_path):
    page = {"origin": "https://app.example.com", "sec-fetch-site": "cross-site"}
    for allowed in (("https://app.example.com",), ("*",)):
        with (
            running(tmp_path / str(len(allowed[0])), more={"allowed_origins": allowed}) as server,
            server.http() as http,
        ):
            assert http.post("/v1/images/generations", json={"prompt": PROMPT}, headers=page).status_code == 200
            picture = http.get("/livez", headers={"sec-fetch-site": "cross-site"})
            assert picture.status_code == (200 if allowed == ("*",) else 403)


def test_a_signed_address_opens_from_everywhere(tmp_path):
    """It is shown in other pages, which is what it is for."""
    with running(tmp_path) as server, server.http() as http:
        body = {"prompt": PROMPT, "response_format": "url"}
        url = http.post("/v1/images/generations", json=body).json()["data"][0]["url"]
        assert http.get(url, headers=CROSS["a picture"]).status_code == 200
        assert http.get(url.partition("?")[0], headers=CROSS["a picture"]).status_code == 403


@pytest.mark.parametrize("headers", [{"host": "evil.example"}, {"host": "localhost", **CROSS["a form in a sandbox"]}])
def test_websockets_are_behind_the_same_door(headers):
    check = KeyCheck(None, None, Origins(), Hosts(), Addresses(b"k" * 32, time.time))  # type: ignore[arg-type]
    sent = []

    async def send(message):
        sent.append(message)

    pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
    asyncio.run(check({"type": "websocket", "headers": pairs}, None, send))  # type: ignore[arg-type]
    assert sent == [{"type": "websocket.close", "code": 1008}]


def test_the_setting():
    assert HTTPArgs(allowed_hosts=" Told.Example, ::2 ").hosts() == ("told.example", "::2")
    assert HTTPArgs(public_url="https://Pictures.example.org:8443/a").hosts() == ("pictures.example.org",)
    assert HTTPArgs().hosts() == ()
    for wrong in ("told.example:8000", "http://told.example", "*", "a b", "["):
        with pytest.raises(InvalidParameterError, match=r"allowed_hosts: got .*names of hosts"):
            HTTPArgs(allowed_hosts=wrong)


def test_names_are_read_without_an_address_parser():
    assert [host_name(host) for host in ("A.b:1", "[::1]:1", "a:")] == ["a.b", "::1", "a"]
    assert not [host for host in (*NO_HOSTS, "") if host_name(host) is not None]
