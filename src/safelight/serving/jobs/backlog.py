"""Unfinished jobs that no server holds, as after a restart: their ids are in memory, all else stays in the store."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping


class Backlog:
    """Jobs that may be claimed: the owners in turns, and of each in the order of acceptance.

    Only for the event loop's thread.

    Attributes:
        filled: set while there are any.

    """

    def __init__(self) -> None:
        self._owners: dict[str, str] = {}
        self._queues: dict[str, dict[str, None]] = {}
        self._over: dict[str, asyncio.Event] = {}
        self.filled = asyncio.Event()

    def __len__(self) -> int:
        return len(self._owners)

    def __contains__(self, job_id: str) -> bool:
        return job_id in self._owners

    def extend(self, owners: Mapping[str, str]) -> None:
        """Add jobs, by their ids, in their order, after those that there are; what is there keeps its place."""
        for job_id, owner in owners.items():
            if job_id not in self._owners:
                self._owners[job_id] = owner
                self._queues.setdefault(owner, {})[job_id] = None
        self._update()

    @property
    def first(self) -> str | None:
        """The job whose turn it is."""
        return next((next(iter(queue)) for queue in self._queues.values()), None)

    def drop(self, job_id: str) -> None:
        """Forget a job that runs, here or elsewhere, or is over; if it was its owner's turn, the next one has it."""
        owner = self._owners.pop(job_id, None)
        if owner is not None:
            queue, had_turn = self._queues[owner], self.first == job_id
            del queue[job_id]
            if had_turn or not queue:
                del self._queues[owner]
            if had_turn and queue:
                self._queues[owner] = queue
        self._update()

    def num_before(self, job_id: str) -> int | None:
        """Return how many have their turn before a job; None if it is not here."""
        owner = self._owners.get(job_id)
        return None if owner is None else self._num_before(owner, list(self._queues[owner]).index(job_id))

    def num_before_new(self, owner: str) -> int:
        """Return how many have their turn before what is accepted of an owner."""
        return self._num_before(owner, len(self._queues[owner])) if owner in self._queues else 0

    def _num_before(self, owner: str, own: int) -> int:
        """Return how many have their turn before an owner has had it so many times, and comes again."""
        before, is_later = own, False
        for other, jobs in self._queues.items():
            is_later = is_later or other == owner
            before += 0 if other == owner else min(len(jobs), own + (not is_later))
        return before

    async def over(self, owner: str) -> None:
        """Wait until an owner has no jobs here: what is accepted meanwhile begins then."""
        while owner in self._queues:
            await self._over.setdefault(owner, asyncio.Event()).wait()

    def _update(self) -> None:
        if self._owners:
            self.filled.set()
        else:
            self.filled.clear()
        for owner in [owner for owner in self._over if owner not in self._queues]:
            self._over.pop(owner).set()
