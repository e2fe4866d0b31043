"""Addresses that open one file without the key, until their end."""

from __future__ import annotations

import itertools
import os
import re
import time
from urllib.parse import parse_qsl, urlencode, urlsplit

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from safelight.errors import InvalidParameterError, StateDirectoryError
from safelight.serving.addresses import KEY_NAME, Addresses, read_address_key
from safelight.serving.http.errors import ExpiredAddressError
from safelight.serving.http_args import HTTPArgs
from tests.serving.http_server import PROMPT, assert_error, running
from tests.serving.stub_engine import VIDEO_SCHEMA
from tests.serving.wire import (
    ASYNC,
    GENERATIONS,
    KEY,
    PAGE,
    finished_job,
    picture_of,
    raw_request,
)


@pytest.fixture(scope="module")
def address(server):
    """Path and query of a picture."""
    with server.openai() as client:
        url = client.images.generate(prompt=PROMPT, response_format="url", n=2).data[1].url
    assert url.startswith(server.url)
    return url.removeprefix(server.url)


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
