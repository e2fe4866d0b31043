"""Every pipeline in every layout gives what one rank gives."""

from __future__ import annotations

import pytest

TOLERANCE = 1e-5

QUICK = [
    ("FluxPipeline", "dev, 36x100, long prompt", {"ulysses": 2}),
]


@pytest.mark.parametrize(("recipe", "case", "layout"), QUICK)
def test_two_ranks_give_what_one_gives(recipe, case, layout, compare):
    difference, _ = compare(recipe, case, layout)
    print(recipe, case, layout, difference)
    assert difference <= TOLERANCE
