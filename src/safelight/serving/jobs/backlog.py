"""Unfinished jobs that no server holds, as after a restart: their ids are in memory, all else stays in the store."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterable


class Backlog:
    """Jobs that may be claimed, in the order of acceptance, one after the other. Only for the event loop's thread.

    Attributes:
        filled: set while there are any.
        over: set while there are none; jobs that are accepted meanwhile begin then.

    """

    def __init__(self) -> None:
        self._places: dict[str, int] = {}
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

    def drop(self, job_id: str) -> None:
        """Forget a job that runs, here or elsewhere, or is over."""
        self._places.pop(job_id, None)
        self._update()

    def position(self, job_id: str) -> int:
        """Return how many jobs are before it at most: those that were cancelled meanwhile count."""
        return self._places[job_id] - next(iter(self._places.values()))

    def _update(self) -> None:
        now, not_now = (self.filled, self.over) if self._places else (self.over, self.filled)
        now.set()
        not_now.clear()
