"""Settings of HTTP, queue and storage: what is refused at once, and what is read out of them."""

from __future__ import annotations

from pathlib import Path

import pytest

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
