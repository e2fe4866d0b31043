"""In which order jobs that wait are given to the engine. Imports no torch.

By weighted fair queueing: of those who have jobs, next is whoever has the fewest in the engine, by their shares of its
time. Among one's own, higher priority goes first, and then what was accepted first.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

from safelight.core.tenant import NOBODY
from safelight.serving.jobs.limits import JobLimits
from safelight.serving.jobs.run import Run

LEAST_SHARE = 1e-6
"""Of whoever has none, beside others who have."""


class FairQueue:
    """The jobs that wait for the engine, of which the first enters it. Only for the event loop's thread.

    Args:
        limits: with the owners' shares.
        submitted: returns the jobs that the engine has.

    """

    def __init__(self, limits: JobLimits, submitted: Callable[[], Iterable[Run]]) -> None:
        self._limits, self._submitted = limits, submitted
        self._waiting: dict[Run, asyncio.Event] = {}

    @contextmanager
    def entered(self, run: Run) -> Iterator[None]:
        """Let a job wait among the others, after those that there are."""
        self._waiting[run] = asyncio.Event()
        try:
            yield
        finally:
            del self._waiting[run]
            self.wake_first()

    async def until_first(self, run: Run) -> None:
        """Wait until a job is the first, which it may cease to be when another comes."""
        while (first := self._first()) is not run:
            if first is not None:
                self._waiting[first].set()
            self._waiting[run].clear()
            await self._waiting[run].wait()

    def wake_first(self) -> None:
        """Wake the job that is the first now, after one has come or gone."""
        if (first := self._first()) is not None:
            self._waiting[first].set()

    def is_kept(self, owner: str) -> bool:
        """Say whether an owner has fewer jobs in the engine than it may, however many of others' are there."""
        if (tenant := self._limits.tenants.get(owner)) is None or not tenant.share:
            return False
        return self._counts()[owner] < max(1, int(tenant.share * self._limits.max_submitted))

    def order(self, runs: Sequence[Run]) -> list[Run]:
        """Return jobs in the order in which they will be the first, if no others come or go."""
        counts, places = self._counts(), {}
        for run in sorted(runs, key=lambda run: -run.job.priority):
            places[run] = self._place(run, counts)
            counts[run.job.owner] += 1
        return sorted(runs, key=lambda run: (places[run], -run.job.priority))

    def _first(self) -> Run | None:
        counts = self._counts()
        return min(self._waiting, key=lambda run: (self._place(run, counts), -run.job.priority), default=None)

    def _counts(self) -> Counter[str]:
        return Counter(run.job.owner for run in self._submitted())

    def _place(self, run: Run, counts: Counter[str]) -> float:
        """Return what a job's owner has in the engine, by its share; where there are no shares, all are alike."""
        if not self._limits.tenants:
            return 0.0
        tenant = self._limits.tenants.get(run.job.owner, NOBODY)
        return counts[run.job.owner] / max(LEAST_SHARE, tenant.share)
