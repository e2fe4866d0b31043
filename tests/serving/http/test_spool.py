"""What a spool says of a disk that fails."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from safelight.errors import QueueFullError, StorageFullError
from safelight.serving.http.spool import Spool
from tests.serving.http_server import PROMPT, assert_error, running


@pytest.mark.parametrize(
    ("number", "expected"),
    [(errno.ENOSPC, StorageFullError), (errno.EDQUOT, StorageFullError), (errno.EMFILE, QueueFullError)],
)
def test_a_disk_that_fails_is_named(number, expected, monkeypatch, tmp_path):
    def fail(*args):
        raise OSError(number, "no")

    found = Spool(tmp_path)
    found.keep(b"x")
    monkeypatch.setattr(os, "pwrite", fail)
    with pytest.raises(expected):
        found.flush()
    open_files = len(list(Path("/proc/self/fd").iterdir()))
    del found
    assert len(list(Path("/proc/self/fd").iterdir())) == open_files - 1


def test_a_full_disk_ends_the_large_request_alone(monkeypatch, tmp_path):
    def full(*args):
        raise OSError(errno.ENOSPC, "full")

    with running(tmp_path) as server, server.http() as http:
        monkeypatch.setattr(os, "pwrite", full)
        large = json.dumps({"prompt": PROMPT, "user": "x" * 100_000})
        sent = http.post("/v1/images/generations", content=large, headers={"content-type": "application/json"})
        assert assert_error(sent, 507)["code"] == "storage_full"
        assert http.post("/v1/images/generations", json={"prompt": PROMPT}).status_code == 200
