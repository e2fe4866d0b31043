"""How long units of a kind took."""

from __future__ import annotations

import statistics

from safelight.runtime.worker.durations import NUM_REMEMBERED, Durations


def test_the_median_is_of_the_last_ones_of_a_kind():
    durations: Durations[str] = Durations()
    assert durations.median("step") is None and not durations.medians()
    seconds = [float(each % 7) for each in range(2 * NUM_REMEMBERED)]
    for each in seconds:
        durations.record("step", each)
    durations.record("decoding", 100.0)
    assert durations.median("step") == statistics.median(seconds[-NUM_REMEMBERED:])
    assert durations.medians() == {"step": durations.median("step"), "decoding": 100.0}


def test_one_slow_unit_says_nothing_of_the_next():
    durations: Durations[int] = Durations()
    for each in (1.0, 1.0, 60.0):
        durations.record(0, each)
    assert durations.median(0) == 1.0
