"""Attention over tokens that lie on several ranks is that over all of them."""

from __future__ import annotations

import pytest

ATTENTION = [
    ([12], 0, {}),
    ([13], 5, {}),
    ([1], 3, {}),
    ([7, 9], 4, {}),
    ([7, 9], 4, {"masked": True}),
    ([10], 6, {"num_kv_heads": 2, "seed": 3}),
]


@pytest.mark.parametrize(("lengths", "num_replicated", "details"), ATTENTION)
@pytest.mark.parametrize("axis", ["ulysses", "ring"])
def test_divided_attention_is_torch_s(pools, axis, lengths, num_replicated, details):
    differences = pools(2).run("attention", layout={axis: 2}, lengths=lengths, num_replicated=num_replicated, **details)
    assert max(differences) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize(("lengths", "num_replicated", "details"), ATTENTION)
@pytest.mark.parametrize("layout", [{"ulysses": 2, "ring": 2}, {"ulysses": 4}, {"ring": 4}], ids=str)
def test_divided_attention_is_torch_s_on_four_ranks(pools, layout, lengths, num_replicated, details):
    if "num_kv_heads" in details and layout.get("ulysses", 1) > details["num_kv_heads"]:
        pytest.skip("more ranks than heads of keys")
    differences = pools(4).run("attention", layout=layout, lengths=lengths, num_replicated=num_replicated, **details)
    assert max(differences) < 1e-6


@pytest.mark.parametrize("axis", ["ulysses", "ring"])
@pytest.mark.parametrize("fault", ["padding", "text"])
def test_these_tests_see_padding_that_is_attended_to_and_text_that_counts_twice(pools, axis, fault):
    differences = pools(2).run("attention", layout={axis: 2}, lengths=[13], num_replicated=5, fault=fault)
    assert max(differences) > 1e-3
