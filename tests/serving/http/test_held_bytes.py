"""What all requests under way hold together."""

from __future__ import annotations

import contextlib

import pytest
from starlette.requests import Request

from safelight.errors import QueueFullError
from safelight.serving.http.held_bytes import HeldBytes
from safelight.serving.limits import Limits


def test_the_last_eighth_is_for_small_bodies(tmp_path):
    """However large ones come, in pieces too; all of it is given back when they are answered."""
    with contextlib.ExitStack() as at_end:
        request = Request({"type": "http", "state": {"at_end": at_end}})
        held = HeldBytes(Limits(held_bytes=800), tmp_path)
        share = held.share(request)
        for num_bytes in (600, 99, 1):
            share.take(num_bytes, is_small=False)
        with pytest.raises(QueueFullError):
            share.take(1, is_small=False)
        for num_bytes in (50, 50):
            share.take(num_bytes, is_small=True)
        with pytest.raises(QueueFullError):
            share.take(1, is_small=True)
    with contextlib.ExitStack() as at_end:
        held.share(Request({"type": "http", "state": {"at_end": at_end}})).take(700, is_small=False)
