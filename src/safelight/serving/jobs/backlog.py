"""Unfinished jobs that no server holds, as after a restart: their ids are in memory, all else stays in the store."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterable, Iterator
from weakref import WeakValueDictionary

from safelight.serving.jobs.job import Job
from safelight.serving.jobs.run import Run


class Backlog:
    """Jobs that may be claimed, in the order of acceptance, one after the other. Only for the event loop's thread.

    Attributes:
        filled: set while there are any.
        over: set while there are none; jobs that are accepted meanwhile begin then.

    """

    def __init__(self) -> None:
        self._places: dict[str, int] = {}
        self._followed: WeakValueDictionary[str, Run] = WeakValueDictionary()
        self._places_given = itertools.count()
        self.filled, self.over = asyncio.Event(), asyncio.Event()
        self.over.set()

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, job_id: str) -> bool:
        return job_id in self._places

    def extend(self, job_ids: Iterable[str]) -> None:
        """Add these in their order, after those that there are; what is there keeps its place."""
        for job_id in job_ids:
            if job_id not in self._places:
                self._places[job_id] = next(self._places_given)
        self._update()

    @property
    def first(self) -> str | None:
        """The job whose turn it is."""
        return next(iter(self._places), None)

    def run(self, job: Job) -> Run:
        """Return the run of the job whose turn it is; whoever followed it follows that."""
        run = self._followed.pop(job.id, None) or Run(job)
        run.job = job
        return run

    def drop(self, job_id: str) -> None:
        """Forget a job that runs, here or elsewhere, or is over."""
        self._places.pop(job_id, None)
        self._update()

    def position(self, job_id: str) -> int:
        """Return how many jobs are before it at most: those that were cancelled meanwhile count."""
        first = self.first
        return self._places[job_id] - self._places[first] if first is not None else 0

    def follow(self, job: Job) -> Run:
        """Return a run that is in memory for as long as anybody follows it."""
        return self._followed.setdefault(job.id, Run(job))

    def followed(self) -> Iterator[Run]:
        """Yield the runs that are followed."""
        yield from list(self._followed.values())

    def followed_as(self, job_id: str) -> Run | None:
        """Return the run of a job, if it is followed."""
        return self._followed.get(job_id)

    def close(self) -> None:
        """Tell whoever follows that nothing more comes."""
        for run in self.followed():
            run.over = True
            run.wake()

    def _update(self) -> None:
        now, not_now = (self.filled, self.over) if self._places else (self.over, self.filled)
        now.set()
        not_now.clear()
