"""Decoding in bands, one a rank, is decoding whole."""

from __future__ import annotations

import pytest

DECODES = [("kl", 8, 6, 1), ("kl", 9, 5, 1), ("wan", 7, 4, 3), ("wan, residual", 4, 3, 2), ("qwen", 5, 6, 1)]


@pytest.mark.parametrize(("kind", "height", "width", "num_frames"), DECODES)
def test_decoding_in_bands_is_the_library_s(pools, kind, height, width, num_frames):
    differences = pools(2).run("decode", kind=kind, height=height, width=width, num_frames=num_frames)
    assert max(differences) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("height", [3, 4, 11])
@pytest.mark.parametrize("kind", ["kl", "wan", "wan, residual", "qwen"])
def test_decoding_in_four_bands(pools, kind, height):
    """Three rows do not make four bands: each rank decodes them all."""
    differences = pools(4).run("decode", kind=kind, height=height, width=4, num_frames=2, seed=height)
    assert max(differences) < 1e-5


@pytest.mark.parametrize("kind", ["kl", "wan"])
def test_these_tests_see_a_missing_halo(pools, kind):
    differences = pools(2).run("decode", kind=kind, height=6, width=4, num_frames=1, fault=True)
    assert max(differences) > 1e-3
