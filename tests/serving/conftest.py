"""A server with a key, and somebody who has none: modules that need another server have their own of this name."""

from __future__ import annotations

import httpx
import pytest

from tests.serving.http_server import running
from tests.serving.wire import KEY


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with running(tmp_path_factory.mktemp("keyed"), key=KEY) as server:
        yield server


@pytest.fixture(scope="module")
def anybody(server):
    """Somebody without the key."""
    with httpx.Client(base_url=server.url, timeout=30) as http:
        yield http
