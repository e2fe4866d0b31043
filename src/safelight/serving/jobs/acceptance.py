"""How a request becomes a durable job. Imports no torch."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import msgspec

from safelight.errors import NotReadyError, QueueFullError, SafelightError
from safelight.serving.admission import Admission
from safelight.serving.http.spool import Stored
from safelight.serving.jobs.job import Job, check_same
from safelight.serving.jobs.leases import Lease
from safelight.serving.jobs.run import Run
from safelight.serving.jobs.runner import Runner

JOBS_A_TRIM = 64
"""Jobs after which the bound on records is looked at."""


class Acceptance:
    """Accepts jobs, or refuses them.

    Attributes:
        under_way: jobs that are being accepted.

    """

    def __init__(self, runner: Runner, lease: Lease) -> None:
        self._runner, self._lease = runner, lease
        self._store, self._retention, self._limits = runner.store, runner.retention, runner.limits
        self._num_accepted = 0
        self.under_way: set[asyncio.Task[Job]] = set()

    async def submit(self, job: Job, files: Mapping[str, bytes | Stored], admission: Admission) -> Job:
        """Accept a job: it is durable when this returns. Whoever asks twice with one idempotency key has one job.

        Args:
            job: that nobody has accepted.
            files: its inputs, by name.
            admission: as what it may be run.

        Raises:
            ConflictError: if the idempotency key came with another request.
            QueueFullError: if as many jobs are unfinished as may be.
            StorageFullError: if there is no room for it.
            NotReadyError: if the model is not known yet, or the server stops.

        """
        if job.idempotency_key is not None:
            existing = await self._store.find(job.owner, job.idempotency_key)
            if existing is not None:
                return check_same(existing, job.digest)
        if self._runner.stops or self._runner.engine.schema is None:
            raise NotReadyError("the server stops" if self._runner.stops else "the model is being loaded")
        runs = self._runner.runs
        num_unfinished = len(runs) + len(self.under_way) + len(self._runner.backlog)
        if num_unfinished >= self._limits.max_unfinished:
            raise QueueFullError(f"{self._limits.max_unfinished} jobs wait already")
        clients = [run.client for run in runs.values()]
        admission.check_place(self._limits.max_unfinished, num_unfinished, clients)
        clocks = self._runner.clocks
        accepted = {"created_at": clocks.stamp(), "accepted": clocks.moment(), "lease": self._lease.number}
        job = msgspec.structs.replace(job, **accepted)
        # A caller that goes away leaves no job behind that is stored and never run.
        task = asyncio.create_task(self._accept(job, files, admission.client))
        self.under_way.add(task)
        task.add_done_callback(self.under_way.discard)
        return await asyncio.shield(task)

    async def _accept(self, job: Job, files: Mapping[str, bytes | Stored], client: str) -> Job:
        self._num_accepted += 1
        async with self._retention.lock:
            if self._num_accepted % JOBS_A_TRIM == 0:
                await self._retention.trim_records()
            await self._retention.make(job.num_bytes)
            if files:
                await self._store.announce(job.id)
                await self._runner.files.save(files)
        try:
            accepted = await self._runner.retry(lambda: self._store.add(job), self._limits.busy_seconds)
        except SafelightError:  # after anything else it may be stored all the same, and needs its files
            await self._retention.remove_files(job.id, files)
            raise
        if accepted.id != job.id:
            await self._retention.remove_files(job.id, files)
        elif accepted is job and job.lease == self._lease.number and not self._runner.stops:  # else whoever finds it
            self._runner.launch(Run(job, client, is_new=True))
        return accepted
