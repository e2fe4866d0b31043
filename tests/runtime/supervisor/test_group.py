"""How a worker's processes end is told in one line, and the kernel takes them first."""

from __future__ import annotations

import asyncio
import signal
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from safelight.runtime.host_memory import Kills
from safelight.runtime.supervisor.group import Rank


@pytest.mark.parametrize(
    ("number", "killed", "told"),
    [
        (
            signal.SIGKILL,
            Kills(1, 1),
            "killed by SIGKILL, by the kernel, because the memory of its control group ran out",
        ),
        (signal.SIGKILL, Kills(0, 1), "killed by SIGKILL, by the kernel, because the machine's memory ran out"),
        (signal.SIGKILL, Kills(), "killed by SIGKILL"),
        (signal.SIGSEGV, Kills(1, 1), "killed by SIGSEGV"),
    ],
)
def test_the_likely_cause_of_a_death_is_told(number, killed, told):
    counts = iter([Kills(), killed])

    async def test():
        process = await asyncio.create_subprocess_exec(sys.executable, "-c", "import time; time.sleep(60)")
        nobody: Any = SimpleNamespace()
        memory: Any = SimpleNamespace(kills=lambda: next(counts))
        rank = Rank(process, nobody, memory=memory)
        process.send_signal(number)
        assert await rank.end() == told

    asyncio.run(test())
