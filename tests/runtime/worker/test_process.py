"""A worker's process begins: it gives way, and looks at none of what it imports again."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.runtime.workers import drive, pid_of, running


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


def test_the_kernel_takes_the_worker_before_its_supervisor(fault_family, fault_folder):
    async def test():
        async with running(fault_folder(name="served")) as supervisor:
            worker = await pid_of(supervisor)
            scores = [int(Path(f"/proc/{pid}/oom_score_adj").read_text()) for pid in ("self", worker)]
            assert scores[1] == min(1000, scores[0] + 500)

    drive(test())
