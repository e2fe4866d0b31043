"""What processes of ours have in common."""

from __future__ import annotations

import gc

import pytest

from safelight.runtime.processes import uncollected


class Kept:
    pass


@pytest.mark.parametrize("enabled", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_what_stays_is_not_looked_at(enabled, fails):
    was_enabled = gc.isenabled()
    (gc.enable if enabled else gc.disable)()
    try:
        with uncollected():
            kept = [Kept() for _ in range(3)]
            assert not gc.isenabled()
            if fails:
                raise ImportError
    except ImportError:
        assert fails
    finally:
        after, looked_at = gc.isenabled(), gc.get_objects()
        (gc.enable if was_enabled else gc.disable)()
    assert after is enabled
    assert not any(entry is each for entry in looked_at for each in kept)
