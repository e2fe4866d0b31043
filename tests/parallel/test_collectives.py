"""Collectives, on two ranks: messages, votes, and a wait that ends."""

from __future__ import annotations

import pytest


@pytest.mark.parametrize("length", [0, 1, 1016, 1017, 5000])
def test_a_message_arrives_whole(pools, length):
    assert pools(2).run("messages", length=length) == [{"message": True, "tensors": True}] * 2


def test_one_vote_against_is_heard_by_all(pools):
    assert pools(2).run("votes") == [[True, False]] * 2


def test_a_wait_for_a_partner_that_does_not_come_ends(pools):
    waited, _ = pools(2).run("lonely_wait", seconds=1.0)
    assert "imed out" in waited or "imeout" in waited
