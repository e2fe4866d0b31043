"""What a worker says of a unit before it begins: whose it is, and how long it may take, by what its kind took."""

from __future__ import annotations

import pytest

from safelight.runtime.unit_board import UnitBoard, UnitLimits
from safelight.runtime.worker.watch import Watch

KIND = ("denoising", 1)


@pytest.fixture
def board(tmp_path):
    board = UnitBoard(tmp_path / "unit")
    yield board
    board.remove()


def announced(board):
    unit = board.read()
    return None if unit is None else (unit.kind, unit.requests, unit.limit)


def test_a_unit_may_take_a_multiple_of_what_its_kind_took(board):
    limits = UnitLimits(least=1.0, first=900.0)
    watch = Watch(board, limits)
    watch.begin(KIND, ["r0", "r1"])
    assert announced(board) == ("denoising", ("r0", "r1"), 900.0)
    watch.learn(KIND, 10.0)
    watch.begin(KIND, ["r0"])
    assert announced(board) == ("denoising", ("r0",), limits.of(10.0)) and 10.0 < limits.of(10.0) < 900.0
    watch.begin(("denoising", 2), ["r0", "r1"])
    assert announced(board) == ("denoising", ("r0", "r1"), 900.0), "another number of outputs is another kind"
    watch.rest()
    assert announced(board) is None


def test_without_a_board_nothing_is_announced():
    watch = Watch()
    watch.begin(KIND, ["r0"])
    watch.learn(KIND, 1.0)
    watch.rest()
