"""What a model was loaded as: made once, and not changed afterwards."""

from __future__ import annotations

import dataclasses

import pytest

from safelight.core.components import Components


def test_it_is_frozen_and_its_defaults_decide_nothing():
    components = Components({"transformer": object()})
    assert components.vae is None and components.residency is None and components.over_ranks is None
    assert components.count_memory() == () and not components.shares_branches
    with pytest.raises(dataclasses.FrozenInstanceError):
        components.vae = None  # type: ignore[misc]
