"""How far a job is, and what becomes of it, for whoever asks or follows it. Imports no torch."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator

from safelight.runtime.client import Progress
from safelight.serving.jobs.run import JobEvent, Run
from safelight.serving.jobs.runner import CANCELLED, Runner


class Events:
    """Tells how far the jobs are that this server runs or may claim, and what becomes of every job."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner

    def progress(self, job_id: str) -> Progress | None:
        """Return how far an unfinished job is; None for every other."""
        run, backlog = self._runner.runs.get(job_id), self._runner.backlog
        if run is None:
            before = backlog.num_before(job_id)
            return None if before is None else Progress(queue_position=self._num_before() + before)
        if run.ticket is not None:
            return run.ticket.progress
        return Progress(queue_position=self._num_before(run) + self._num_found_before(run))

    async def follow(self, job_id: str) -> AsyncIterator[JobEvent]:
        """Yield what a job is now and what becomes of it, to its end; a slow reader misses steps, nothing else.

        It ends without a last event if the server stops before the job does. Nothing is yielded for an unknown id.
        """
        run = await self._found(job_id)
        told: JobEvent | None = None
        while run is not None:
            changed = run.changed
            for event in self._news(run, told):
                told = event
                yield event
            if run.changed is not changed:
                continue
            if run.job.finished:
                return
            if job_id in self._runner.runs:
                await changed.wait()
                continue
            if not self._runner.stops:
                await asyncio.sleep(self._runner.limits.retry_seconds)
            run = None if self._runner.stops else await self._found(job_id, run)

    async def _found(self, job_id: str, known: Run | None = None) -> Run | None:
        """Return a job that runs here, or as the store has it; one that has been deleted was cancelled before."""
        runs = self._runner.runs
        if known is not None and job_id in self._runner.backlog:
            return known
        job = None if job_id in runs else await self._runner.store.get(job_id)
        if job_id in runs:  # it may have been taken up meanwhile
            return runs[job_id]
        if job is None and known is not None:
            job = self._runner.expiry.ended(known.job.failed(CANCELLED))
        return None if job is None else Run(job)

    def _num_before(self, run: Run | None = None) -> int:
        """Return how many requests are before a job, or before the backlog: in the engine's queue, and for it."""
        waiting = self._runner.queue.order([each for each in self._runner.runs.values() if each.ticket is None])
        waiting.sort(key=lambda each: self._num_found_before(each) > 0)
        before = sum(not each.is_new for each in waiting) if run is None else waiting.index(run)
        return self._runner.engine.stats.num_waiting + before

    def _num_found_before(self, run: Run) -> int:
        """Return how many jobs of the backlog are before one: what this server accepts goes after what it found."""
        return self._runner.backlog.num_before_new(run.job.owner) if run.is_new else 0

    def _news(self, run: Run, told: JobEvent | None) -> Iterator[JobEvent]:
        """Yield the events that lead from what was told last to what is now."""
        job, progress = run.job, run.ticket.progress if run.ticket else self.progress(run.job.id) or Progress()
        if job.state == progress.state == "queued" and (told is None or told.progress != progress):
            yield JobEvent("queued", job, progress)
        if job.attempts and not (told is None and job.finished) and job.attempts != (told.job.attempts if told else 0):
            yield JobEvent("started", job, progress)
        elif job.state == "in_progress" and told is not None and told.progress != progress:
            yield JobEvent("step", job, progress)
        if job.state in ("completed", "failed"):
            yield JobEvent(job.state, job, progress)
