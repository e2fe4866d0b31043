"""What processes of ours have in common."""

from __future__ import annotations

import gc
import subprocess
import sys

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


def test_a_worker_looks_at_none_of_its_imports():
    script = (
        "import gc\n"
        "from safelight.runtime.worker import process\n"
        "class Channel:\n"
        "    def send(self, message): pass\n"
        "    def close(self): pass\n"
        "process.run(Channel(), '/nowhere/board')\n"  # it ends there, once everything has been imported
        "assert gc.isenabled() and 'torch' in __import__('sys').modules\n"
        "print(len(gc.get_objects()), gc.get_freeze_count())\n"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    looked_at, frozen = map(int, ran.stdout.split())
    assert frozen > 100_000 and looked_at < frozen / 10, ran.stderr
