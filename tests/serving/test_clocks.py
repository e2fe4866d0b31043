"""Durations are known on one clock alone."""

from __future__ import annotations

from safelight.serving.clocks import Moment, machine_moments


def test_moments_of_two_clocks_are_not_compared():
    earlier, later = Moment("a", 2.0), Moment("a", 5.5)
    assert later.since(earlier) == 3.5
    assert later.since(None) is None and earlier.since(later) is None
    assert later.since(Moment("b", 2.0)) is None


def test_the_machines_clock_goes_on_for_whoever_asks():
    first, second = machine_moments()(), machine_moments()()
    assert first.clock == second.clock and (second.since(first) or 0.0) >= 0.0
