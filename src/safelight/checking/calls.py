"""Our calls of a model beside the reference's: which belong together, and what they made."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from safelight.checking.record import OUTPUT, Kind, RecordedCall, Recorder, block_names, leaf_names, recording_calls
from safelight.checking.report import DIVERGES, NOT_COMPARED, OK, Row, compare_recorded, paired, total_difference
from safelight.layers.fusable import FusableLayer


@dataclass(frozen=True)
class Pair:
    """A call of ours, and the reference's of the same step and component whose arguments are nearest.

    Attributes:
        ours: our call.
        theirs: the reference's, which may hold other branches in its batch; None where it has none in that step.

    """

    ours: RecordedCall
    theirs: RecordedCall | None

    def rows(self, tolerance: float) -> list[Row]:
        """Return a row for everything kept of our call.

        Where its output agrees, what is inside has another form, or none that matters.
        """
        theirs = {} if self.theirs is None else self.theirs.entries
        rows = {
            entry: compare_recorded(self.ours.title(entry), made, theirs.get(entry), tolerance)
            for entry, made in self.ours.entries.items()
        }
        if OUTPUT in rows and rows[OUTPUT].verdict == OK:
            for entry, row in rows.items():
                if self.ours.entries[entry].kind is Kind.INNER and row.verdict == DIVERGES:
                    note = "another form: the output agrees"
                    rows[entry] = dataclasses.replace(row, verdict=NOT_COMPARED, note=note)
        return list(rows.values())


def pairs_of(ours: Sequence[RecordedCall], theirs: Sequence[RecordedCall]) -> dict[int, Pair]:
    """Return the pair of each of our calls, by the call's `id`.

    The reference may begin with another branch, and may make several in one batch.
    """
    pairs, used = {}, set[int]()
    for call in ours:
        candidates = [other for other in theirs if (other.component, other.step) == (call.component, call.step)]
        nearest = min(candidates, key=lambda other: (difference_of(call, other), id(other) in used), default=None)
        used.add(id(nearest))
        pairs[id(call)] = Pair(call, nearest)
    return pairs


def difference_of(ours: RecordedCall, theirs: RecordedCall) -> float:
    """Return how far the arguments of two calls are from each other, where both have them in a form."""
    total = 0.0
    for entry, made in ours.entries.items():
        if entry.startswith(": ") and entry != OUTPUT and entry in theirs.entries:
            total += total_difference(paired(made.tensors, theirs.entries[entry].tensors, partly=True) or [])
    return total


def compare_branches(ours: Sequence[RecordedCall], theirs: Sequence[RecordedCall]) -> Row:
    """Return a row of how many guidance branches the first step has: rows of all its calls together."""
    here, there = (sum(call.num_rows for call in calls if call.step == 0) for calls in (ours, theirs))
    if here == there or not there:
        return Row("guidance branches", str(here), 0.0, 0.0, OK)
    note = (
        f"the reference has {there}: `num_branches` of the parameters says how many, "
        "`should_use_guidance` and `branches` of the config which"
    )
    return Row("guidance branches", str(here), None, None, DIVERGES, note)


def rows_inside(pair: Pair, entry: str, root: nn.Module, their_root: nn.Module, tolerance: float) -> list[Row]:
    """Return rows of what lies inside a call, up to the layers of the first block that diverges.

    They are not kept from the start, because there are too many: the call is made once more for them.

    Args:
        pair: the call, here and in the reference.
        entry: what diverges of it: a module, or the output, in which blocks are looked for first.
        root: our model.
        their_root: the reference's.
        tolerance: as in `compare`.

    """
    if entry != OUTPUT:
        below = leaf_names(root, entry.removeprefix("."))
        # A layer of ours that does more than the reference's of its name is no match for it.
        return remade(pair, root, their_root, below, tolerance)
    if any(name.startswith(".") for name in pair.ours.entries):
        return []
    rows = remade(pair, root, their_root, block_names(root), tolerance)
    first = next((index for index, row in enumerate(rows) if row.verdict == DIVERGES), None)
    if first is None:
        return rows
    block = rows[first].what.removeprefix(pair.ours.component).partition(", call ")[0]
    return [*rows[:first], *rows_inside(pair, block, root, their_root, tolerance), *rows[first:]]


def remade(pair: Pair, root: nn.Module, their_root: nn.Module, names: Sequence[str], tolerance: float) -> list[Row]:
    """Make a call once more on both sides, and return a row for each module that both have."""
    assert pair.theirs is not None
    matching = [name for name in names if not isinstance(root.get_submodule(name), FusableLayer)]
    made = []
    for call, module in ((pair.ours, root), (pair.theirs, their_root)):
        recorder = Recorder()
        with torch.inference_mode(), recording_calls(recorder, call.component, module, matching):
            module(**call.arguments)
        made.append(recorder.calls[0].entries)
    mine, theirs = made
    return [
        compare_recorded(pair.ours.title(entry), recorded, theirs[entry], tolerance)
        for entry, recorded in mine.items()
        if entry.startswith(".") and entry in theirs
    ]
