"""By what a server holds jobs, and how it takes those that nobody holds. Imports no torch."""

from __future__ import annotations

import asyncio
import functools
import logging

from safelight.errors import StorageError
from safelight.serving.jobs.job import MAX_ATTEMPTS, Job
from safelight.serving.jobs.run import Run
from safelight.serving.jobs.runner import WORKER_LOST, Runner

logger = logging.getLogger(__name__)

RENEWALS = 3
"""Of a lease, in the time for which it lasts."""


class Lease:
    """One server's lease: keeps it, stops what it has lost, and claims what nobody holds, the owners in turns.

    Args:
        server: the name of this server, among all that share the store.
        runner: of the jobs that it holds.

    Attributes:
        number: as the store counts; 0, which is nobody's, before it has begun and where it is lost.

    """

    def __init__(self, server: str, runner: Runner) -> None:
        self._server, self._runner = server, runner
        self._store, self._backlog, self._seconds = runner.store, runner.backlog, runner.limits.lease_seconds
        self._renewed = runner.clocks.moment()
        self.number = 0

    @property
    def has_lapsed(self) -> bool:
        """Whether another server may have been given this one's jobs, by this one's own clock."""
        passed = self._runner.clocks.moment().since(self._renewed)
        return not self._store.is_exclusive and (passed is None or passed >= self._seconds)

    def covers(self, job: Job) -> bool:
        """Say whether a job may be run: it was claimed by this very lease, which has not lapsed.

        One that was lost meanwhile does not come back with the next, which others may have claimed it before.
        """
        return job.lease == self.number and not self.has_lapsed

    async def begin(self) -> None:
        """Get another lease; what the last one held may be claimed again, as what nobody holds."""
        asked = self._runner.clocks.moment()
        self.number = await self._store.begin_lease(self._server, self._seconds)
        self._renewed = asked
        await self._look()

    async def end(self) -> None:
        """Let other servers have what it holds."""
        await self._store.renew_lease(self.number, 0.0)

    async def renew(self) -> None:
        """Renew the lease; stop what it does not hold any more, and find what may be claimed."""
        runs, asked = list(self._runner.runs.values()), self._runner.clocks.moment()
        held = None
        if not self.has_lapsed:  # if it has, the store is not asked, which may take long
            held = await self._store.renew_lease(self.number, self._seconds)
        if held is None:
            self.number = 0
            for run in list(self._runner.runs.values()):
                run.is_lost = True
                self._runner.stop(run)
            await self.begin()
            return
        self._renewed = asked
        for run in runs:
            if run.job.id not in held and not run.job.finished:
                await self._runner.look(run)
                self._runner.stop(run)
        await self._look()

    async def renew_forever(self) -> None:
        """Renew the lease in time, until this is cancelled."""
        while True:
            await asyncio.sleep(self._seconds / RENEWALS)
            try:
                await self.renew()
            except StorageError as error:
                logger.error("the lease on jobs is not renewed: %s", error)
            except Exception:  # the boundary of this task, on which all jobs depend
                logger.exception("the lease on jobs is not renewed")

    async def take_forever(self) -> None:
        """Claim and run jobs one after the other, of which a few are in memory at a time, until this is cancelled."""
        places = asyncio.Semaphore(self._runner.limits.max_taken)
        while True:
            await places.acquire()
            while (job_id := self._backlog.first) is None:
                await self._backlog.filled.wait()
            try:
                job = await self._runner.retry(functools.partial(self._claimed, job_id))
            except StorageError:  # the server stops
                return
            except Exception:  # a job's boundary: its record is damaged, and the others' are not
                logger.exception("job %s cannot be read", job_id)
                job = None
            if job is not None and not job.finished and job_id in self._backlog and job.lease == self.number:
                self._runner.launch(Run(job)).add_done_callback(lambda _: places.release())
            else:
                places.release()
            self._backlog.drop(job_id)  # after the launch: with the last one, what came later is let go

    async def _look(self) -> None:
        """Find the unfinished jobs that nobody holds; those that have begun too often fail."""
        unclaimed = await self._store.unclaimed()
        found = {job_id: each for job_id, each in unclaimed.items() if job_id not in self._runner.runs}
        for job_id, each in found.items():
            if each.attempts >= MAX_ATTEMPTS and (job := await self._claimed(job_id)) is not None:
                await self._store.replace(job, self._runner.expiry.ended(job.failed(WORKER_LOST)))
        self._backlog.extend({job_id: each.owner for job_id, each in found.items() if each.attempts < MAX_ATTEMPTS})

    async def _claimed(self, job_id: str) -> Job | None:
        return await self._store.claim(job_id, self.number)
