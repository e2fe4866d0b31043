"""A clock that the model's steps move, and nothing else."""

from __future__ import annotations

import pytest

from benchmarks.serving import VirtualClock


@pytest.fixture
def clock(monkeypatch, fault_family):
    """Return the clock by which steps take their time."""
    from safelight_fault.pipeline import FaultPipeline

    clock = VirtualClock()
    monkeypatch.setattr(FaultPipeline, "sleep", staticmethod(clock.sleep))
    return clock
