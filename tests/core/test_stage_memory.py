"""What stages take, by the request's size."""

from __future__ import annotations

from safelight.core.stage_memory import StageMemory, largest_need


def test_bytes_lie_on_a_plane_over_pixels_and_tokens_and_are_never_below_none():
    assert StageMemory("decoding", 1000, 2.5, 0).of(100, 7) == 1250
    assert StageMemory("denoising", 10, 0, 3).of(100, 7) == 31
    assert StageMemory("encoding", -50, 0, 1).of(100, 7) == 0


def test_the_largest_stage_depends_on_the_size():
    stages = [StageMemory("encoding", 1000, 0, 0), StageMemory("decoding", 0, 10, 0)]
    assert largest_need(stages, 10, 1) == (1000, "encoding")
    assert largest_need(stages, 1000, 1) == (10_000, "decoding")
    assert largest_need([], 10, 1) == (0, "")
