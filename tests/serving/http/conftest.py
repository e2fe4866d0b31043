"""Fixtures of bodies that are looked at a piece at a time."""

from __future__ import annotations

import pytest

from safelight.serving.http import long_texts, pieces, spool
from safelight.serving.http.spool import Stored


@pytest.fixture
def small(monkeypatch):
    """Pieces of seven bytes have every boundary in every place."""
    monkeypatch.setattr(pieces, "PIECE", 7)
    monkeypatch.setattr(pieces, "ESCAPED_PIECE", 5)
    for module in (pieces, long_texts, spool):
        monkeypatch.setattr(module, "turn", lambda: None)
    monkeypatch.setattr(pieces.pieces, "__defaults__", (7,))
    monkeypatch.setattr(Stored.pieces, "__defaults__", (0, 7))
    monkeypatch.setattr(long_texts, "_LONG", 3)
