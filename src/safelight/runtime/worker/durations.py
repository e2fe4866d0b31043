"""How long things took. Imports no torch."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Hashable
from statistics import median
from typing import Generic, TypeVar

NUM_REMEMBERED = 31
"""Durations of a kind, of which the median is taken."""

Kind = TypeVar("Kind", bound=Hashable)


class Durations(Generic[Kind]):
    """How long units of each kind took, in seconds."""

    def __init__(self) -> None:
        self._seconds: defaultdict[Kind, deque[float]] = defaultdict(lambda: deque(maxlen=NUM_REMEMBERED))
        self._medians: dict[Kind, float] = {}

    def record(self, kind: Kind, seconds: float) -> None:
        """Remember one."""
        self._seconds[kind].append(seconds)
        self._medians[kind] = median(self._seconds[kind])

    def median(self, kind: Kind) -> float | None:
        """Return the median of the last ones; None where there was none."""
        return self._medians.get(kind)

    def medians(self) -> dict[Kind, float]:
        """Return every kind's."""
        return self._medians
