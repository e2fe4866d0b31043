"""Settings of HTTP, queue and storage: what is refused at once, and what is read out of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from safelight.client import RemoteEngine
from safelight.core.options import options_of
from safelight.core.server_args import ServerArgs
from safelight.errors import InvalidParameterError, UsageError
from safelight.serving.http_args import HTTPArgs


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"port": 0}, "port: got 0; it takes a whole number from 1 to 65535"),
        ({"share": 1.5}, "share: got 1.5; it takes a number from 0 to 1"),
        ({"unit_limit": 0.0}, "unit_limit: got 0.0; it takes a number of at least 0.1"),
        ({"max_storage": 0}, "max_storage: got 0; it takes a whole number of at least 1"),
        ({"batching": "some"}, "batching: got 'some'; it takes exact, throughput"),
        ({"response_format": "png"}, "response_format: got 'png'; it takes b64_json, url"),
        ({"public_url": "here"}, "public_url: got 'here'; it takes http:// or https:// and a host"),
        ({"host": "[::1]"}, "host: got '[::1]'; it takes an address without brackets"),
        ({"allowed_origins": "https://a.example/"}, "allowed_origins: got 'https://a.example/'; it takes origins"),
        ({"allowed_hosts": "a:80"}, "allowed_hosts: got 'a:80'; it takes names of hosts without ports"),
    ],
)
def test_what_is_not_taken_is_refused_by_name(given, says):
    with pytest.raises(InvalidParameterError) as caught:
        HTTPArgs(**given)
    assert says in str(caught.value)


def test_the_keys_are_read_from_the_file(tmp_path):
    path = tmp_path / "key"
    path.write_text("  0123456789abcdef \nanother line\n")
    keys = HTTPArgs(api_key_file=str(path), host="0.0.0.0").keys()
    assert keys.principal("0123456789abcdef") is not None and keys.principal("another") is None


def test_a_host_that_others_reach_needs_a_key():
    assert not HTTPArgs(host="127.0.0.2").keys(), "without keys everyone is let in"
    with pytest.raises(UsageError, match=r"host: 0\.0\.0\.0 is reachable by others; it needs --api-key-file"):
        HTTPArgs(host="0.0.0.0").keys()


def test_the_state_directory_is_in_the_home_directory_unless_named(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert HTTPArgs().state_path() == tmp_path / ".local/state/safelight"
    assert HTTPArgs(state_dir="/var/lib/x").state_path() == Path("/var/lib/x")


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


WRONG: tuple[Any, ...] = (5, 1.5, True, [], {}, b"x", object(), "\0", "x" * 5000, float("nan"), -1, ("a",))


@pytest.mark.parametrize("cls", [ServerArgs, HTTPArgs])
def test_every_setting_refuses_what_it_does_not_take(cls):
    """By its name, and never otherwise; texts refuse everything but short texts."""
    for name, option in options_of(cls).items():
        for value in WRONG:
            try:
                cls(**{name: value})
            except InvalidParameterError as error:
                assert error.param is not None and error.param.startswith(name), (name, value, error)
            else:
                assert option.kind != "text", (name, value)
