"""What a comparison found: a row a tensor, in the order in which ours were made."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import torch
from torch import Tensor

from safelight.checking.record import Kind, Recorded

OK, DIVERGES, NOT_COMPARED = "ok", "DIVERGES", "-"
HEADINGS = ("what", "shape", "largest", "mean", "")


@dataclass(frozen=True)
class Row:
    """One thing that was compared.

    Attributes:
        what: its name.
        shape: of ours; of the reference too, where it is another.
        largest: the largest absolute difference; None where nothing could be subtracted.
        mean: the mean absolute difference.
        verdict: `ok`, `DIVERGES`, or `-` for what was not compared.
        note: why, if it is not a matter of numbers.

    """

    what: str
    shape: str
    largest: float | None
    mean: float | None
    verdict: str
    note: str = ""

    def cells(self) -> tuple[str, ...]:
        """Return the row's texts in a table."""
        numbers = ["" if number is None else f"{number:.1e}" for number in (self.largest, self.mean)]
        return (self.what, self.shape, *numbers, f"{self.verdict}  {self.note}".rstrip())


@dataclass(frozen=True)
class Report:
    """All rows of a comparison.

    Attributes:
        model: what was compared.
        pipeline_name: its class.
        rows: in the order in which ours were made.

    """

    model: str
    pipeline_name: str
    rows: tuple[Row, ...]

    @property
    def first(self) -> Row | None:
        """The first tensor that diverges; None where none does."""
        return next((row for row in self.rows if row.verdict == DIVERGES), None)

    def summary(self) -> str:
        """Return in a line what was found."""
        counts = f"{sum(row.verdict == OK for row in self.rows)} of {len(self.rows)} rows agree"
        first = self.first
        if first is None:
            return f"{self.pipeline_name} agrees with Diffusers: {counts}, none diverges"
        size = first.note if first.largest is None else f"largest difference {first.largest:.1e}, mean {first.mean:.1e}"
        return f"{self.pipeline_name} diverges first at {first.what}: {size}"

    def json(self) -> dict[str, Any]:
        """Return the whole report as JSON holds it."""
        return {
            "model": self.model,
            "pipeline": self.pipeline_name,
            "ok": self.first is None,
            "first_divergence": None if self.first is None else dataclasses.asdict(self.first),
            "rows": [dataclasses.asdict(row) for row in self.rows],
        }

    def table(self, whole: bool) -> str:
        """Return the rows in columns: all, or those up to the first that diverges."""
        shown = self.rows if whole or self.first is None else self.rows[: self.rows.index(self.first) + 1]
        lines = [HEADINGS, *(row.cells() for row in shown)]
        widths = [max(len(line[column]) for line in lines) for column in range(len(HEADINGS))]
        text = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
        ]
        if len(shown) < len(self.rows):
            text.append(f"... {len(self.rows) - len(shown)} more, made from it; --all shows them")
        return "\n".join(text)


def compare_recorded(what: str, ours: Recorded, theirs: Recorded | None, tolerance: float) -> Row:
    """Return the row of one thing that ours made, and the reference perhaps.

    Args:
        what: its name.
        ours: as we made it.
        theirs: as the reference did; None if it made nothing of this name.
        tolerance: of the largest difference, in units of the reference's largest value if that is above 1.

    """
    if theirs is None:
        return Row(what, shapes(ours.tensors), None, None, NOT_COMPARED, "only here")
    pairs = paired(ours.tensors, theirs.tensors, partly=ours.kind in (Kind.OUTPUT, Kind.INNER))
    other = shapes(theirs.tensors)
    if pairs is None:
        verdict = NOT_COMPARED if ours.kind is Kind.INNER else DIVERGES
        return Row(what, shapes(ours.tensors), None, None, verdict, f"the reference's shape is {other}")
    numel = sum(mine.numel() for mine, _ in pairs)
    differences = [(mine.double() - reference.double()).abs() for mine, reference in pairs if mine.numel()]
    largest = float(torch.stack([difference.max() for difference in differences]).max()) if numel else 0.0
    if not math.isfinite(largest):
        return Row(what, shapes(ours.tensors), None, None, DIVERGES, "not finite")
    mean = sum(float(difference.sum()) for difference in differences) / max(1, numel)
    scale = max([float(reference.double().abs().max()) for _, reference in pairs if reference.numel()], default=0.0)
    limit = 0.0 if ours.kind is Kind.EXACT else tolerance * max(1.0, scale)
    note = "" if numel == sum(tensor.numel() for tensor in theirs.tensors) else f"a part of {other}"
    return Row(what, shapes(ours.tensors), largest, mean, OK if largest <= limit else DIVERGES, note)


def paired(ours: Sequence[Tensor], theirs: Sequence[Tensor], partly: bool) -> list[tuple[Tensor, Tensor]] | None:
    """Bring what two modules return into pairs of one shape; None where they cannot be.

    A tuple's order is a matter of taste (text first, or image), and so is whether streams are joined along the
    sequence: of all ways that fit, the one with the smallest difference is taken.

    Args:
        ours: what ours returned.
        theirs: what the reference did.
        partly: whether the reference may have more: other guidance branches in the same batch, or, where it returns
            one tensor [B, S, C], tokens behind those of ours.

    """
    if partly and (rows := branches(ours, theirs)):
        each = [pairs for row in rows if (pairs := paired(ours, row, partly)) is not None]
        return min(each, key=total_difference, default=None)
    sides = [(list(ours), side) for order in permutations(theirs) for side in (list(order), joined(order))]
    sides += [(joined(order), list(theirs)) for order in permutations(ours)]
    if partly and len(ours) == len(theirs) == 1 and ours[0].ndim == theirs[0].ndim == 3:
        sides.append((list(ours), [theirs[0][:, : ours[0].shape[1]]]))
    candidates = [
        [(a, b.reshape(a.shape)) for a, b in zip(left, right, strict=True)]
        for left, right in sides
        if len(left) == len(right) and all(map(same_size, left, right))
    ]
    return min(candidates, key=total_difference, default=None)


def branches(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> list[list[Tensor]]:
    """Return the reference's tensors row by row, where it has several times the batch of ours; nothing elsewhere."""
    sizes = [{tensor.shape[0] if tensor.ndim else 0 for tensor in side} for side in (ours, theirs)]
    if any(len(size) != 1 for size in sizes):
        return []
    (batch,), (rows,) = sizes
    if not batch or rows <= batch or rows % batch:
        return []
    return [list(row) for row in zip(*(torch.split(tensor, batch) for tensor in theirs), strict=True)]


def total_difference(pairs: list[tuple[Tensor, Tensor]]) -> float:
    """Return the sum of absolute differences, NaN counted as nothing."""
    return sum(float((a.double() - b.double()).abs().nansum()) for a, b in pairs)


def joined(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return [B, S, C] tensors as one, or nothing where they cannot be joined along the sequence."""
    fit = all(tensor.ndim == 3 for tensor in tensors) and len({(t.shape[0], t.shape[-1]) for t in tensors}) == 1
    return [torch.cat(tuple(tensors), dim=1)] if fit else []


def same_size(ours: Tensor, theirs: Tensor) -> bool:
    """Say whether two shapes are one, but for dimensions of size 1."""
    return [size for size in ours.shape if size != 1] == [size for size in theirs.shape if size != 1]


def shapes(tensors: Sequence[Tensor]) -> str:
    """Return the shapes of one tensor or several for people."""
    return " ".join("x".join(map(str, tensor.shape)) or "scalar" for tensor in tensors)
