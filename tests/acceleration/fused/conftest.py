"""Checks on few tokens."""

from __future__ import annotations

import pytest

from safelight.acceleration.fused import examples


@pytest.fixture
def few_tokens(monkeypatch):
    monkeypatch.setattr(examples, "NUM_TOKENS", 9)
    monkeypatch.setattr(examples, "NUM_TEXT", 4)
