"""The jobs of one server: what accepts, runs, tells of and removes them, started and stopped together. No torch."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
from typing import Any

from safelight.errors import StateDirectoryError, StorageError
from safelight.runtime.client import EngineClient
from safelight.serving.clocks import Clocks
from safelight.serving.jobs.acceptance import Acceptance
from safelight.serving.jobs.events import Events
from safelight.serving.jobs.files import Files
from safelight.serving.jobs.job import Job
from safelight.serving.jobs.leases import Lease
from safelight.serving.jobs.limits import JobLimits
from safelight.serving.jobs.runner import CANCELLED, Runner
from safelight.serving.jobs.store import JobStore

logger = logging.getLogger(__name__)

_STOP_SECONDS = 5.0
"""What a stopped job has to end; a step may take longer, and is then left to itself."""


class JobManager:
    """Runs the jobs of one store on one engine. Its methods are for the event loop's thread.

    Args:
        store: of the jobs.
        outputs: their files.
        engine: that makes them.
        limits: what bounds them.
        clocks: what they go by.
        server: its name, among all that share the store: what an earlier one of that name held, it may claim at once.

    Attributes:
        acceptance: accepts jobs.
        events: tells how far they are, and what becomes of them.

    """

    def __init__(
        self,
        store: JobStore,
        outputs: Files,
        engine: EngineClient,
        limits: JobLimits | None = None,
        clocks: Clocks | None = None,
        server: str = "",
    ) -> None:
        self.store, self.outputs = store, outputs
        self.runner = Runner(
            store, outputs, engine, limits or JobLimits(), clocks or Clocks(), lambda job: self.lease.covers(job)
        )
        self.expiry, self.retention = self.runner.expiry, self.runner.retention
        self.lease = Lease(server, self.runner)
        self.acceptance, self.events = Acceptance(self.runner, self.lease), Events(self.runner)
        self._taking: list[asyncio.Task[None]] = []
        self._renewing: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Remove what a dead server left, take up its jobs, and begin to run them. Nothing is done a second time.

        Raises:
            StateDirectoryError: if the directories cannot be read and written.

        """
        if self._renewing is not None:
            return
        try:
            self.expiry.begin(await self.store.last_end())
            await self.lease.begin()
            await self.outputs.clean(self.store.kept)
            await self.store.forget()
        except StorageError as error:
            raise StateDirectoryError(f"state directory: {self.store.where!r} cannot be used: {error}") from error
        self._renewing = asyncio.create_task(self.lease.renew_forever(), name="renew the lease on jobs")
        self._taking = [
            asyncio.create_task(self._sweep_forever(), name="sweep jobs"),
            asyncio.create_task(self.lease.take_forever(), name="take up jobs"),
        ]

    async def cancel(self, job_id: str) -> Job | None:
        """End a job as `failed`, with the code `cancelled`; one that has finished stays as it is.

        One that another server runs is stopped when that renews its lease.

        Returns:
            the job, finished; None if there is none.

        Raises:
            StorageFullError: if that cannot be written down; nothing has changed then.

        """
        while True:
            job = await self.store.get(job_id)
            if job is None or job.finished:
                return job
            failed = self.expiry.ended(job.failed(CANCELLED))
            replace = functools.partial(self.store.replace, job, failed)
            if await self.runner.retry(replace, self.runner.limits.busy_seconds):
                self.runner.end(failed)
                return failed

    async def delete(self, job_id: str) -> bool:
        """Remove a job and its files, and stop it if it runs; say whether there was one.

        Raises:
            StorageFullError: if an unfinished one cannot be ended because the disk is full.

        """
        job = await self.cancel(job_id)
        return job is not None and await self.retention.remove(job)

    async def sweep(self) -> None:
        """Remove what has expired, and what is over the quota."""
        await self.retention.sweep(self.runner.runs.keys())

    async def close(self, drain: float) -> None:
        """Stop: what waits stays in the store, and what runs has `drain` seconds to finish. Then close the store.

        What has not finished by then stays in progress, and has its next attempt when a server takes it up.
        """
        self.runner.stops = True
        for taking in self._taking:
            taking.cancel()
        for run in list(self.runner.runs.values()):
            if not run.running:
                self.runner.stop(run)
        await self._wait(drain)
        for run in list(self.runner.runs.values()):
            self.runner.stop(run)
            if run.task is not None:
                run.task.cancel()
        await self._wait(_STOP_SECONDS)
        if self._renewing is not None:
            self._renewing.cancel()
            await asyncio.wait([self._renewing])
        with contextlib.suppress(StorageError):  # it ends by itself, too
            await self.lease.end()
        await self.outputs.close()
        await self.store.close()

    async def _wait(self, seconds: float) -> None:
        runs = [run.task for run in self.runner.runs.values() if run.task is not None]
        waited: list[asyncio.Task[Any]] = [*runs, *self._taking, *self.acceptance.under_way]
        if waited:
            await asyncio.wait(waited, timeout=seconds)

    async def _sweep_forever(self) -> None:
        while True:
            try:
                await self.sweep()
            except Exception:  # the boundary of this task: a full disk now is no reason not to sweep later
                logger.exception("expired jobs could not be removed")
            await asyncio.sleep(self.runner.limits.sweep_seconds)
