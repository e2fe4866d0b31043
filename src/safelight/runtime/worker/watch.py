"""What a worker says of each unit before it begins: whose it is, and how long it may take."""

from __future__ import annotations

import time
from collections.abc import Sequence

from safelight.runtime.unit_board import Unit, UnitBoard, UnitLimits
from safelight.runtime.worker.durations import Durations


class Watch:
    """Announces each unit, and learns how long its kind takes.

    Args:
        board: where units are announced; None announces nowhere.
        limits: how long units may take.

    """

    def __init__(self, board: UnitBoard | None = None, limits: UnitLimits | None = None) -> None:
        self._board = board
        self._limits = limits or UnitLimits()
        self._seconds: Durations[tuple[str, int]] = Durations()

    def begin(self, kind: tuple[str, int], requests: Sequence[str]) -> None:
        """Announce a unit, before it begins."""
        if self._board is not None:
            limit = self._limits.of(self._seconds.median(kind))
            self._board.write(Unit(kind[0], tuple(requests), time.monotonic(), limit))

    def learn(self, kind: tuple[str, int], seconds: float) -> None:
        """Say what a unit took."""
        self._seconds.record(kind, seconds)

    def rest(self) -> None:
        """Say that nothing is under way."""
        if self._board is not None:
            self._board.write(None)
