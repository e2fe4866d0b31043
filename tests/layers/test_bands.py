"""Rows of an activation in bands: found again, let go of, and cut about equally."""

from __future__ import annotations

import pytest
import torch

from safelight.layers.bands import Bands, cuts


def test_rows_are_found_across_bands_until_they_are_let_go():
    whole = torch.randn(1, 2, 10, 3)
    bands = Bands(0, list(whole.split((4, 1, 5), dim=2)))
    for top, bottom in ((0, 10), (1, 3), (3, 6), (4, 5), (9, 10)):
        assert torch.equal(bands.rows(top, bottom), whole[:, :, top:bottom])
    assert bands.rows(1, 3).data_ptr() == whole[:, :, 1:].data_ptr(), "a view where one band has them all"
    bands.release(4)
    assert (bands.first, len(bands.bands)) == (4, 2)
    assert torch.equal(bands.rows(4, 8), whole[:, :, 4:8])
    bands.release(9)
    assert (bands.first, len(bands.bands)) == (5, 1), "a band goes when its last row does"


@pytest.mark.parametrize(("height", "rows"), [(1, 8), (8, 8), (9, 8), (65, 8), (7, 1)])
def test_bands_cover_every_row_once_and_none_is_too_high(height, rows):
    found = list(cuts(height, rows))
    assert [row for top, bottom in found for row in range(top, bottom)] == list(range(height))
    heights = [bottom - top for top, bottom in found]
    assert max(heights) <= rows and max(heights) - min(heights) <= 1
