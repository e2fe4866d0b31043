"""Settings of HTTP, queue and storage: what is refused at once, and what is read out of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from safelight.errors import InvalidParameterError, UsageError
from safelight.serving.http_args import HTTPArgs, read_key


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


def test_the_key_is_in_the_files_first_line(tmp_path):
    path = tmp_path / "key"
    path.write_text("  0123456789abcdef \nanother line\n")
    assert HTTPArgs(api_key_file=str(path), host="0.0.0.0").api_key() == read_key(str(path)) == "0123456789abcdef"
    path.write_text("short\n")
    with pytest.raises(InvalidParameterError, match=r"api_key_file: got .* a key of 16 or more printable"):
        read_key(str(path))


def test_a_host_that_others_reach_needs_a_key():
    assert HTTPArgs(host="127.0.0.2").api_key() is None
    with pytest.raises(UsageError, match=r"host: 0\.0\.0\.0 is reachable by others; it needs --api-key-file"):
        HTTPArgs(host="0.0.0.0").api_key()


def test_the_state_directory_is_in_the_home_directory_unless_named(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert HTTPArgs().state_path() == tmp_path / ".local/state/safelight"
    assert HTTPArgs(state_dir="/var/lib/x").state_path() == Path("/var/lib/x")
