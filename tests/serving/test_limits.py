"""The bounds that are promised."""

from __future__ import annotations

from safelight.serving.limits import Limits


def test_limits_are_the_promised_ones():
    limits = Limits()
    assert (limits.body_bytes, limits.image_bytes, limits.image_pixels) == (32 << 20, 16 << 20, 25_000_000)
    assert (limits.image_side, limits.outputs) == (8192, 10)
    assert (limits.header_seconds, limits.request_seconds, limits.stalled_seconds) == (10.0, 30.0, 60.0)
