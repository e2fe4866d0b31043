"""Which of our calls belongs to which of the reference's, and how many branches each has."""

from __future__ import annotations

import torch

from safelight.checking.calls import compare_branches, pairs_of
from safelight.checking.record import OUTPUT, Kind, Recorded, RecordedCall
from safelight.checking.report import DIVERGES, OK


def call(value, step=0, component="transformer", rows=1, number=1):
    given = Recorded((torch.full((rows, 3), float(value)),), Kind.INNER)
    return RecordedCall(component, number, step, {}, {": hidden_states": given, OUTPUT: given})


def test_a_call_is_paired_by_step_component_and_nearest_arguments():
    """The reference may make its branches in another order."""
    ours = [call(1), call(5), call(1, step=1), call(1, component="transformer_2")]
    theirs = [call(5.1), call(1.2, step=1), call(0.9)]
    pairs = pairs_of(ours, theirs)
    assert [pairs[id(each)].theirs for each in ours] == [theirs[2], theirs[0], theirs[1], None]


def test_a_difference_is_told_and_agreement_is_too():
    ours, theirs = call(1), call(1.5)
    verdicts = {row.verdict for row in pairs_of([ours], [theirs])[id(ours)].rows(1e-4)}
    assert verdicts == {DIVERGES}
    assert {row.verdict for row in pairs_of([ours], [call(1)])[id(ours)].rows(1e-4)} == {OK}


def test_branches_are_rows_of_the_first_step():
    assert compare_branches([call(1), call(2)], [call(1, rows=2), call(1, step=1, rows=9)]).verdict == OK
    row = compare_branches([call(1)], [call(1, rows=2)])
    assert row.verdict == DIVERGES and "num_branches" in row.note
