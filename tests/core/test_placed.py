"""Values that stand in lists travel one by one, and stand in them again."""

from __future__ import annotations

import pytest

from safelight.core.placed import joined, placed


@pytest.mark.parametrize("value", ["a", ("a",), ("a", "b", "c"), (("a",), ("b", "c")), ((("a", "b"),), "c")], ids=str)
def test_what_was_taken_apart_is_as_it_was(value):
    """One value is none in a list of one."""
    assert joined(list(placed(value))) == value


def test_places_are_in_order():
    assert list(placed([["a"], ["b", "c"]])) == [((0, 0), "a"), ((1, 0), "b"), ((1, 1), "c")]
    assert list(placed("a")) == [((), "a")]
