"""HTTP as clients and browsers expect it: addresses, origins, HEAD, schemes, slashes, and the id that the log has."""

from __future__ import annotations

import itertools
import logging
import os
import re
import socket
import time
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openai import OpenAI

from safelight.client import RemoteEngine
from safelight.errors import InvalidParameterError, StateDirectoryError
from safelight.serving.addresses import KEY_NAME, Addresses, read_address_key
from safelight.serving.http.errors import ExpiredAddressError
from safelight.serving.http_args import HTTPArgs
from tests.live_server import fault_model, serving
from tests.serving.http_server import PROMPT, assert_error, next_answer, running
from tests.serving.stub_engine import IMAGE_SCHEMA, VIDEO_SCHEMA
from tests.serving.test_api import ASYNC, GENERATIONS, finished_job, flat

KEY = "sk-a key of many characters"
PAGE = "https://app.example.com"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with running(tmp_path_factory.mktemp("keyed"), key=KEY) as server:
        yield server


@pytest.fixture(scope="module")
def anybody(server):
    """Somebody without the key."""
    with httpx.Client(base_url=server.url, timeout=30) as http:
        yield http


@pytest.fixture(scope="module")
def address(server):
    """Path and query of a picture."""
    with server.openai() as client:
        url = client.images.generate(prompt=PROMPT, response_format="url", n=2).data[1].url
    assert url.startswith(server.url)
    return url.removeprefix(server.url)


def picture_of(answer) -> Any:
    """Return the one picture of an SDK's answer, whose fields are those that were asked for."""
    (picture,) = answer.data
    return picture


def get_routes(server):
    app = server.server.config.loaded_app
    return sorted({re.sub(r"\{[^}]*\}", "x", route.path) for route in flat(app) if "GET" in route.methods})


# signed addresses


def test_an_address_opens_without_the_key(server, anybody, address):
    whole = anybody.get(address)
    assert whole.status_code == 200 and whole.headers["content-type"] == "image/png"
    assert whole.content.startswith(b"\x89PNG") and whole.headers["x-request-id"].startswith("req_")
    part = anybody.get(address, headers={"range": "bytes=1-3"})
    assert (part.status_code, part.content) == (206, b"PNG")
    head = anybody.head(address)
    assert head.status_code == 200 and head.content == b""
    assert int(head.headers["content-length"]) == len(whole.content)
    assert anybody.get(address, headers={"authorization": "Bearer wrong"}).status_code == 200
    assert anybody.get(address, headers={"origin": PAGE}).status_code == 200
    path = urlsplit(address).path
    assert_error(anybody.get(path), 401)
    assert_error(anybody.get(path + "?index=1"), 401)


def test_addresses_do_not_hold_the_key_and_end_with_the_job(server, address):
    job_id = address.split("/")[3]
    with server.http() as http:
        job = http.get(f"/v1/jobs/{job_id}").json()
    query = dict(parse_qsl(urlsplit(address).query))
    assert set(query) == {"index", "expires", "signature"} and re.fullmatch("[0-9a-f]{64}", query["signature"])
    assert job["expires_at"] <= int(query["expires"]) <= job["expires_at"] + 1
    assert KEY not in address and KEY.encode().hex() not in address
    assert job["outputs"][1]["url"] == server.url + address, "one address while it is kept"


def test_every_url_that_is_answered_opens(tmp_path):
    """Of pictures, of jobs, and of videos; in answers, and in events."""
    with running(tmp_path, VIDEO_SCHEMA, key=KEY) as server, server.http() as http, httpx.Client() as anybody:
        job_id = http.post("/v1/videos", json={"prompt": PROMPT}).json()["id"]
        (output,) = finished_job(http, job_id)["outputs"]
        video = anybody.get(output["url"])
        assert video.status_code == 200 and video.content[4:8] == b"ftyp"
        assert anybody.get(output["url"], headers={"range": "bytes=4-7"}).content == b"ftyp"
        assert f'"{output["url"]}"' in http.get(f"/v1/jobs/{job_id}/events").text
        thumbnail = output["url"] + "&variant=thumbnail"
        assert assert_error(anybody.get(thumbnail), 403)["code"] == "invalid_signature"
        assert http.get(urlsplit(output["url"]).path + "?variant=thumbnail").status_code == 200


def altered(address):
    """Yield what an address becomes in other hands."""
    path, _, query = address.partition("?")
    pairs = parse_qsl(query)
    other = path.replace("image_", "image_0", 1)
    yield "another job", f"{other}?{query}"
    yield "another route", f"{path.replace('jobs', 'videos')}?{query}"
    for index, (name, value) in enumerate(pairs):
        rest = [*pairs[:index], *pairs[index + 1 :]]
        if name != "signature":
            yield f"without {name}", f"{path}?{urlencode(rest)}"
        digits = "0123456789abcdef"
        places = range(0, len(value), 9)
        for place in places:
            for changed in (digits[digits.index(value[place]) - 1], "", value[place] * 2, "\u00e9", "%"):
                text = value[:place] + changed + value[place + 1 :]
                yield f"{name} changed", f"{path}?{urlencode([*rest, (name, text)])}"
        for extra in (value, "0", ""):
            yield f"{name} twice", f"{address}&{urlencode([(name, extra)])}"
            yield f"{name} twice, before", f"{path}?{urlencode([(name, extra)])}&{query}"
    yield "more", f"{address}&variant=video"
    yield "forged", f"{path}?index=0&expires=99999999999&signature={'0' * 64}"
    yield "empty", f"{path}?signature="


def test_an_altered_address_is_refused(server, anybody, address):
    tried = list(altered(address))
    assert len(tried) > 60
    with server.http() as with_key:
        for what, changed in tried:
            for http in (anybody, with_key):
                error = assert_error(http.get(changed), 403)
                assert error["code"] == "invalid_signature" and "forged, altered or cut" in error["message"], what
    assert anybody.get(address).status_code == 200


def test_an_address_is_for_reading_one_file(server, anybody, address):
    path, _, query = address.partition("?")
    job = path.removesuffix("/content")
    for method, other in [
        *itertools.product(["POST", "DELETE", "PUT", "OPTIONS"], [address]),
        ("GET", f"{job}?{query}"),
        ("DELETE", f"{job}?{query}"),
        ("GET", f"{job}/events?{query}"),
        ("GET", f"/v1/models?{query}"),
        ("GET", f"{path}%2f?{query}"),
        ("GET", f"{path}?{query.replace('signature=', 'Signature=')}"),
    ]:
        assert_error(anybody.request(method, other), 401)
    spelled_otherwise = raw_request(server, f"/{path}/?{query}")
    assert anybody.send(spelled_otherwise).status_code == 200, "slashes are no part of a path"


def test_an_expired_address_says_so(server, anybody, address):
    addresses = Addresses(server.settings.address_key, time.time)
    path = urlsplit(address).path
    for end, status in ((time.time() - 1, 403), (time.time() + 60, 200)):
        answer = anybody.get(addresses.signed(path, {"index": "0"}, end))
        assert answer.status_code == status
    error = assert_error(anybody.get(addresses.signed(path, {"index": "0"}, 1.0)), 403)
    assert error["code"] == "address_expired" and "expired" in error["message"]
    forged = Addresses(b"another key", time.time).signed(path, {"index": "0"}, time.time() + 60)
    assert assert_error(anybody.get(forged), 403)["code"] == "invalid_signature"


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    query=st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=3),
    end=st.integers(1000, 2000),
    now=st.integers(1000, 2000),
)
def test_what_is_signed_is_let_in_until_its_end(query, end, now):
    addresses = Addresses(b"key", clock=lambda: now)
    path = "/v1/jobs/image_\u00fc/content"
    taken = {name: value for name, value in query.items() if name not in ("expires", "signature")}
    signed = addresses.signed(path, taken, end).partition("?")[2]
    scope = {"path": path, "query_string": signed.encode("ascii"), "method": "GET"}
    assert addresses.judges(scope)
    if now < end:
        addresses.check(scope)
    else:
        with pytest.raises(ExpiredAddressError):
            addresses.check(scope)


def test_addresses_outlive_the_server(tmp_path):
    """One that is made of the same state directory takes them; one that is not does not."""
    opened = {}
    for life in ("first", "second", "other"):
        folder = tmp_path / ("other" if life == "other" else "one")
        (folder / "state").mkdir(parents=True, exist_ok=True)
        key = read_address_key(folder / "state")
        with running(folder, key=KEY, more={"address_key": key}) as server, server.http() as http:
            if life == "first":
                answer = http.post(GENERATIONS, json={"prompt": PROMPT, "response_format": "url"}).json()
                address = answer["data"][0]["url"].removeprefix(server.url)
            opened[life] = httpx.get(server.url + address).status_code
    assert opened == {"first": 200, "second": 200, "other": 403}


def test_the_secret_is_for_the_server_alone(tmp_path):
    umask = os.umask(0)
    try:
        key = read_address_key(tmp_path)
    finally:
        os.umask(umask)
    path = tmp_path / KEY_NAME
    assert len(key) == 32 and path.stat().st_mode & 0o777 == 0o600
    assert read_address_key(tmp_path) == key and [each.name for each in tmp_path.iterdir()] == [KEY_NAME]
    path.unlink()
    (tmp_path / f".{KEY_NAME}").write_bytes(b"what a server left that died")
    key = read_address_key(tmp_path)
    assert [each.name for each in tmp_path.iterdir()] == [KEY_NAME]
    path.chmod(0o640)
    with pytest.raises(StateDirectoryError, match="others may read it"):
        read_address_key(tmp_path)
    path.chmod(0o600)
    for damaged in (b"", key[:31], key + b"x"):
        path.write_bytes(damaged)
        with pytest.raises(StateDirectoryError, match="damaged"):
            read_address_key(tmp_path)
    path.unlink()
    path.symlink_to("/etc/hostname")
    with pytest.raises(StateDirectoryError):
        read_address_key(tmp_path)
    path.unlink()
    assert read_address_key(tmp_path) != key
    with pytest.raises(StateDirectoryError, match="cannot be used"):
        read_address_key(tmp_path / "nowhere")


# the form of answers that a setting chooses


def test_addresses_may_be_the_default_form(tmp_path):
    with running(tmp_path, more={"response_format": "url"}) as server, server.openai() as client:
        answer = client.images.generate(prompt=PROMPT)
        assert picture_of(answer).b64_json is None and picture_of(answer).url.startswith(server.url)
        assert picture_of(client.images.generate(prompt=PROMPT, response_format="b64_json")).url is None
        assert picture_of(client.images.generate(prompt=PROMPT, extra_body={"response_format": None})).url
        (event,) = client.images.generate(prompt=PROMPT, stream=True)
        assert event.b64_json, "events hold their pictures"
        with server.http() as http:
            schema = http.get("/v1/models/tiny/schema").json()["properties"]["response_format"]
            assert schema["default"] == "url"
            assert http.post(GENERATIONS, json={"prompt": PROMPT}, headers=ASYNC).status_code == 202


@pytest.mark.parametrize("value", ["base64", "URL", ""])
def test_forms_that_there_are_not(value):
    with pytest.raises(InvalidParameterError, match="response_format: got"):
        HTTPArgs(response_format=value)


@pytest.mark.parametrize("hours", [float("inf"), float("nan"), -1, 1e9])
def test_every_address_has_an_end(hours):
    with pytest.raises(InvalidParameterError, match="keep_hours: got"):
        HTTPArgs(keep_hours=hours)


# origins


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


@pytest.mark.parametrize(
    "text",
    [
        "",
        "*",
        "https://app.example.com",
        " https://app.example.com , http://localhost:3000 ",
        "http://127.0.0.1:5173,http://[::1]:5173",
        "chrome-extension://abcdefgh",
        "https://xn--bcher-kva.example",
    ],
)
def test_origins_that_a_setting_takes(text):
    names = [name.strip() for name in text.split(",") if name.strip()]
    assert list(HTTPArgs(allowed_origins=text).origins()) == names


@pytest.mark.parametrize(
    "name",
    [
        "app.example.com",
        "https://app.example.com/",
        "https://app.example.com/page",
        "https://App.example.com",
        "https://*.example.com",
        "https://app.example.com:443",
        "http://app.example.com:80",
        "https://user@app.example.com",
        "https://app.example.com?x",
        "https://",
        "https://a..b",
        "https://app.example.com:port",
        "https://b\u00fccher.example",
        "null",
        "**",
        "https://a.example https://b.example",
    ],
)
def test_origins_that_no_browser_writes_are_refused_at_start(name):
    for text in (name, f"https://fine.example,{name}"):
        with pytest.raises(
            InvalidParameterError, match=r"allowed_origins: got .* it takes origins as browsers"
        ) as caught:
            HTTPArgs(allowed_origins=text)
        assert repr(name) in str(caught.value)


# HEAD, methods


def test_head_is_wherever_get_is(server):
    with server.http() as http:
        job = http.post(GENERATIONS, json={"prompt": PROMPT}, headers=ASYNC).json()["id"]
        finished_job(http, job)
        routes = [
            path.replace("/jobs/x", f"/jobs/{job}").replace("/models/x", "/models/tiny") for path in get_routes(server)
        ]
        assert len(routes) >= 14
        for path in routes:
            got, head = http.get(path), http.head(path)
            assert head.status_code == got.status_code and head.content == b"", path
            varying = ("date", "x-request-id", *(["content-length"] if path == "/metrics" else []))
            headers = [{k: v for k, v in each.headers.items() if k not in varying} for each in (got, head)]
            assert headers[0] == headers[1], path
        assert_error(http.get("/nowhere"), 404)
        assert http.head("/nowhere").status_code == 404 and http.head(GENERATIONS).status_code == 405
    assert httpx.head(f"{server.url}/v1/models").status_code == 401


def test_a_connection_is_kept_after_head(server):
    head = f"HEAD /v1/models HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {KEY}\r\n\r\n".encode()
    with server.connect(head * 3) as sock, sock.makefile("rb") as file:
        for _ in range(3):
            assert file.readline().startswith(b"HTTP/1.1 200")
            while file.readline() != b"\r\n":
                pass
        sock.sendall(b"GET /livez HTTP/1.1\r\nhost: localhost\r\n\r\n")
        assert next_answer(file)[2] == {"status": "ok"}


def test_head_of_a_stream_does_not_wait_for_its_end(tmp_path):
    with running(tmp_path) as server, server.http() as http:
        job = http.post(GENERATIONS, json={"prompt": "[hold]"}, headers=ASYNC).json()["id"]
        server.until(lambda: server.engine.stats.num_running == 1)
        began = time.monotonic()
        assert http.head(f"/v1/jobs/{job}/events").headers["content-type"].startswith("text/event-stream")
        assert time.monotonic() - began < 5
        server.call(server.engine.release)
        assert finished_job(http, job)["state"] == "completed"


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("/v1/videos", {"GET", "HEAD", "POST"}),
        ("/v1/videos/x", {"GET", "HEAD", "DELETE"}),
        ("/v1/jobs/x", {"GET", "HEAD", "DELETE"}),
        (GENERATIONS, {"POST"}),
        ("/livez", {"GET", "HEAD"}),
        ("/", {"GET", "HEAD"}),
    ],
)
def test_allow_names_every_method(server, path, allowed):
    with server.http() as http:
        for method in ("PUT", "PATCH", "OPTIONS", "TRACE", "BREW"):
            answer = http.request(method, path)
            message = assert_error(answer, 405)["message"]
            assert set(answer.headers["allow"].split(", ")) == allowed and answer.headers["allow"] in message


# keys


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER", "bEaReR", "Bearer ", "bearer  "])
def test_the_scheme_in_any_case(server, anybody, scheme):
    assert anybody.get("/v1/models", headers={"authorization": f"{scheme} {KEY}"}).status_code == 200
    for wrong in (KEY.upper(), KEY[:-1], f"{KEY}x", "x", f"Bearer {KEY}"):
        assert_error(anybody.get("/v1/models", headers={"authorization": f"{scheme} {wrong}"}), 401)


# paths


def spelled(path):
    """Yield a path with slashes that say nothing."""
    yield path + "/"
    yield path + "//"
    yield "/" + path
    yield path.replace("/", "//")
    yield path.replace("/", "///") + "/"


def test_slashes_that_say_nothing(server, anybody):
    with server.http() as http:
        for path in get_routes(server):
            plain = http.get(path)
            for other in spelled(path):
                answer = anybody.send(raw_request(server, other, KEY))
                assert answer.status_code == plain.status_code, other
                if plain.headers["content-type"] == "application/json" and path != "/":
                    assert answer.json() == plain.json(), other
                open_to_all = anybody.send(raw_request(server, other))
                assert (open_to_all.status_code == 200) == (path == "/livez"), other
        for other in spelled(GENERATIONS):
            request = raw_request(server, other, KEY, method="POST", json={"prompt": PROMPT})
            assert anybody.send(request).status_code == 200


def raw_request(server, target, key=None, method="GET", **more):
    """Return a request whose target is sent as it stands: httpx would take `//a` for a host."""
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    request = httpx.Request(method, server.url, headers=headers, **more)
    request.url = request.url.copy_with(raw_path=target.encode())
    return request


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


@pytest.mark.parametrize("target", ["http://other.example/livez", "HTTP://x:1//livez/", "http://x"])
def test_a_target_in_absolute_form(server, target):
    answer = server.raw(f"GET {target} HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {KEY}\r\n\r\n".encode())
    assert answer[0] == 200 and ("status" in answer[2]) == ("livez" in target)


# what it is, and where


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


@pytest.mark.parametrize("host", ["[::1]", "[::]"])
def test_brackets_are_for_addresses(host):
    with pytest.raises(InvalidParameterError, match=r"host: got .* without brackets"):
        HTTPArgs(host=host)
    assert HTTPArgs(host=host[1:-1]).host == host[1:-1]


@pytest.mark.parametrize("url", ["http://[::1", "http://::1:8000", "http://::1", "http://h:port", "http://\x00"])
def test_addresses_that_a_client_cannot_use(url):
    with pytest.raises(InvalidParameterError, match="url: got"):
        RemoteEngine(url)


@pytest.mark.parametrize("key", ["k\u00e9y", "key\n", "key\r\nx: y"])
def test_keys_that_a_client_cannot_send(key):
    with pytest.raises(InvalidParameterError, match="api_key: got") as caught:
        RemoteEngine("http://127.0.0.1:1", api_key=key)
    assert key not in str(caught.value)


# the log


FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "stream": {"stream": True},
    "url": {"response_format": "url"},
    "job": {},
}


def ids_in_log(caplog):
    return [set(re.findall(r"req_[0-9a-f]{32}", record.getMessage())) for record in caplog.records]


@pytest.mark.parametrize("prompt", ["[garbage]", "[fail:internal_error]"])
@pytest.mark.parametrize("form", FORMS)
def test_the_log_has_the_id_of_a_failed_request(server, caplog, prompt, form):
    with caplog.at_level(logging.ERROR), server.http() as http:
        answer = http.post(GENERATIONS, json={"prompt": prompt, **FORMS[form]}, headers=ASYNC if form == "job" else {})
        told = answer.headers["x-request-id"]
        if form == "job":
            job = finished_job(http, answer.json()["id"])
            assert job["error"]["code"] == "internal_error"
            assert any(job["id"] in record.getMessage() for record in caplog.records)
        else:
            assert "internal_error" in answer.text and "x-request-id" in answer.text
    assert {told} in ids_in_log(caplog), [record.getMessage() for record in caplog.records]
    assert server.engine.submitted[-1].request_id.endswith(told), "the worker's log names it by this"


def test_an_id_is_told_of_a_job_that_another_request_sent(server, caplog):
    """Two requests of one idempotency key wait for one job: each finds it by its own id."""
    with caplog.at_level(logging.ERROR), server.http() as http:
        headers = {"idempotency-key": "one of two"}
        body = {"prompt": "[fail:internal_error] twice", "response_format": "url"}
        answers = [http.post(GENERATIONS, json=body, headers=headers) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [500, 500]
    for answer in answers:
        lines = [r.getMessage() for r in caplog.records if answer.headers["x-request-id"] in r.getMessage()]
        assert any(re.search("image_[0-9a-f]{32}", line) for line in lines)


def test_what_is_no_mistake_of_ours_is_not_logged(server, caplog):
    with caplog.at_level(logging.ERROR), server.http() as http:
        assert_error(http.post(GENERATIONS, json={"prompt": "[fail:out_of_memory]"}), 503)
        assert_error(http.post(GENERATIONS, json={"size": 3}), 400, "size")
    assert caplog.records == []


# whole servers


def test_ids_addresses_and_origins_of_a_whole_server(tmp_path):
    """The worker's log has the id beside the traceback; addresses open in the server's next life."""
    model = fault_model(tmp_path / "model")
    options = ["--allowed-origins", PAGE, "--response-format", "url", "--no-warm-up"]
    with serving(tmp_path, model, *options, key=KEY) as server, server.http() as http:
        told = {}
        for form in ("b64_json", "url"):
            body = {"prompt": "[raise@denoising:1] a cat", "response_format": form}
            answer = http.post(GENERATIONS, json=body)
            assert_error(answer, 500)
            told[form] = answer.headers["x-request-id"]
        log = server.log.read_text()
        for request_id in told.values():
            assert re.search(rf"worker ERROR [^\n]*{request_id}[^\n]*failed\nTraceback", log), log
        lost = http.post(GENERATIONS, json={"prompt": "[exit@denoising:1] a cat", "response_format": "b64_json"})
        assert assert_error(lost, 503)["code"] == "worker_lost"
        with OpenAI(base_url=f"{server.url}/v1", api_key=KEY) as client:
            url = picture_of(client.images.generate(prompt="a cat")).url
        assert KEY not in url and httpx.get(url).status_code == 200
        assert httpx.get(url, headers={"origin": PAGE}).headers["access-control-allow-origin"] == PAGE
        assert re.search(rf"worker died [^\n]*{lost.headers['x-request-id']}", server.log.read_text())
        secret = tmp_path / "state" / KEY_NAME
        assert secret.stat().st_mode & 0o777 == 0o600
    with serving(tmp_path, model, "--no-warm-up", key=KEY) as server:
        address = url.partition("/v1/")[2]
        assert httpx.get(f"{server.url}/v1/{address}").status_code == 200
        assert_error(httpx.get(f"{server.url}/v1/{address}0"), 403)


def has_ipv6():
    with socket.socket(socket.AF_INET6) as sock:
        try:
            sock.bind(("::1", 0))
        except OSError:
            return False
    return True


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no ::1")
@pytest.mark.slow
def test_a_server_on_ipv6(tmp_path):
    prompt = "a large red circle at the left on a white background"
    with serving(tmp_path, None, "--no-warm-up", host="::1") as server:
        assert f"http://[::1]:{server.port}\n" in server.log.read_text()
        with RemoteEngine(server.url) as engine, server.http() as http:
            assert engine.schema.pipeline_name == "FluxPipeline" and engine.url == f"http://[::1]:{server.port}"
            answer = http.post(GENERATIONS, json={"prompt": prompt, "response_format": "url"}).json()
            assert answer["data"][0]["url"].startswith(server.url + "/")
            assert httpx.get(answer["data"][0]["url"]).status_code == 200
            own = http.post(GENERATIONS, json={"prompt": prompt}, headers={"origin": server.url})
            assert own.status_code == 200
