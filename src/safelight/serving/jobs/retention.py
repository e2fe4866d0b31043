"""How long finished jobs stay: until they expire, are over the quota, or somebody removes them. Imports no torch."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Collection, Iterable

from safelight.errors import StorageError, StorageFullError
from safelight.serving.jobs.expiry import Expiry
from safelight.serving.jobs.files import Files
from safelight.serving.jobs.job import Job
from safelight.serving.jobs.limits import JobLimits
from safelight.serving.jobs.store import JobStore

logger = logging.getLogger(__name__)

REMOVED_AT_ONCE = 500
"""Jobs whose files, left over by the disk, are looked for at a time."""


class Retention:
    """Removes jobs, and then their files. Its methods are for the event loop's thread.

    Attributes:
        lock: held by whoever makes room and takes it.

    """

    def __init__(self, store: JobStore, files: Files, expiry: Expiry, limits: JobLimits) -> None:
        self._store, self._files, self._expiry, self._limits = store, files, expiry, limits
        self.lock = asyncio.Lock()
        self._left: set[str] = set()
        """Jobs of which the disk did not let go some files."""
        self._gone: set[str] = set()
        """Jobs that are no more, nor are their files: what the store may forget."""

    async def sweep(self, busy: Collection[str]) -> None:
        """Remove what has expired, and what is over the quota; `busy` are jobs whose files may be written now."""
        while expired := await self._store.expired(self._expiry.horizon()):
            for job in expired:
                await self.remove(job)
        async with self.lock:
            await self.make(0)
            await self.trim_records()
        await self._remove_left()
        if forgotten := self._gone.difference(busy):
            await self._store.forget(forgotten)
            self._gone -= forgotten

    async def remove(self, job: Job) -> bool:
        """Remove a finished job, and then its files; on a full disk the files first, which makes room for the rest.

        Files that the disk does not let go are tried again later.
        """
        self._gone.discard(job.id)  # an attempt's files may be gone; now it is the job's
        try:
            removed = await self._store.delete(job.id)
        except StorageFullError:
            await self._files.remove([file.name for file in job.files])
            removed = await self._store.delete(job.id)
        await self.remove_files(job.id, [file.name for file in job.files], others=job.attempts > 1)
        return removed is not None

    async def remove_others(self, job: Job) -> None:
        """Remove what an earlier attempt has left of a job that is over: its server died before that was completed."""
        if job.attempts > 1:
            with contextlib.suppress(StorageError):  # the next start removes them
                await self._files.remove_others(job.id, [file.name for file in job.files])

    async def remove_files(self, job_id: str, names: Iterable[str], others: bool = False) -> None:
        """Remove files of a job, and with `others` those that an earlier attempt left, at once or when the disk can."""
        try:
            await self._files.remove(names)
            if others:
                await self._files.remove_others(job_id, ())
            self._gone.add(job_id)
        except StorageError as error:
            logger.error("files of job %s stay for now: %s", job_id, error)
            self._left.add(job_id)

    async def _remove_left(self) -> None:
        """Remove what the disk did not let go, of jobs that are over."""
        some = list(self._left)[:REMOVED_AT_ONCE]
        for job_id, known in (await self._store.kept(some)).items():
            if known.is_over:
                await self._files.remove_others(job_id, known.names)
                self._left.discard(job_id)
                self._gone.add(job_id)

    async def make(self, num_bytes: int) -> None:
        """Remove the first finished jobs until so many bytes fit. Only under the lock.

        Raises:
            StorageFullError: if they never will.

        """
        limit = self._limits.max_bytes
        if limit is None:
            return
        usage = await self._store.usage()
        if num_bytes and usage.num_bytes - usage.num_bytes_finished + num_bytes > limit:
            raise StorageFullError("the files of this job need more room than all jobs may take")
        await self._remove_first(usage.num_bytes + num_bytes - limit, lambda job: job.num_bytes)

    async def trim_records(self) -> None:
        """Remove finished jobs until all records are within their bound. Only under the lock."""
        excess = (await self._store.usage()).num_bytes_records - self._limits.max_record_bytes
        await self._remove_first(excess, lambda job: len(job.record), failed_first=True)

    async def _remove_first(self, excess: int, size: Callable[[Job], int], failed_first: bool = False) -> None:
        while excess > 0 and (removable := await self._store.removable(failed_first=failed_first)):
            for job in removable:
                if excess > 0 and await self.remove(job):
                    excess -= size(job)
