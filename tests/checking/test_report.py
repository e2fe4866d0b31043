"""What counts as agreement, of one thing that both have made."""

from __future__ import annotations

import torch

from safelight.checking.record import Kind, Recorded
from safelight.checking.report import compare_recorded


def test_a_tolerance_is_in_units_of_the_largest_value():
    ours, theirs = (Recorded((torch.tensor([0.0, value]),), Kind.CLOSE) for value in (100.0, 100.5))
    assert compare_recorded("x", ours, theirs, 0.01).verdict == "ok"
    assert compare_recorded("x", ours, theirs, 0.001).verdict == "DIVERGES"
    exact = Recorded(ours.tensors, Kind.EXACT)
    assert compare_recorded("x", exact, theirs, 0.01).verdict == "DIVERGES"
    not_a_number = Recorded((torch.tensor([0.0, torch.nan]),), Kind.CLOSE)
    assert compare_recorded("x", not_a_number, theirs, 1e9).verdict == "DIVERGES"


def test_another_form_is_no_divergence_inside_a_call():
    """Two streams in another order, joined, or with tokens behind them."""
    text, image = torch.randn(1, 5, 8), torch.randn(1, 7, 8)
    joined = torch.cat((text, image), dim=1)
    forms = [(text, image), (image, text), (joined,)]
    for ours in forms:
        for theirs in forms:
            row = compare_recorded("x", Recorded(ours, Kind.INNER), Recorded(theirs, Kind.INNER), 0.0)
            assert (row.verdict, row.largest) == ("ok", 0.0)
    part = compare_recorded("x", Recorded((text,), Kind.OUTPUT), Recorded((joined,), Kind.OUTPUT), 0.0)
    assert part.verdict == "ok" and part.note == "a part of 1x12x8"
    whole = compare_recorded("x", Recorded((text,), Kind.CLOSE), Recorded((joined,), Kind.CLOSE), 0.0)
    assert whole.verdict == "DIVERGES" and "1x12x8" in whole.note


def test_branches_of_guidance_may_be_one_batch_in_the_reference():
    negative, positive = torch.randn(2, 1, 5, 8)
    both = Recorded((torch.cat((negative, positive)),), Kind.OUTPUT)
    row = compare_recorded("x", Recorded((positive,), Kind.OUTPUT), both, 0.0)
    assert (row.verdict, row.largest) == ("ok", 0.0)
    assert compare_recorded("x", Recorded((positive + 1,), Kind.OUTPUT), both, 0.1).verdict == "DIVERGES"
    assert compare_recorded("x", Recorded((positive,), Kind.CLOSE), both, 0.0).verdict == "DIVERGES"
