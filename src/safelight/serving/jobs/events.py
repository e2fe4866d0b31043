"""How far a job is, and what becomes of it, for whoever asks or follows it. Imports no torch."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Iterator

from safelight.runtime.client import Progress
from safelight.serving.jobs.run import JobEvent, Run
from safelight.serving.jobs.runner import Runner


class Events:
    """Tells of the jobs that this server runs, or may claim."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner

    def progress(self, job_id: str) -> Progress | None:
        """Return how far an unfinished job is; None for every other."""
        run, backlog = self._runner.runs.get(job_id), self._runner.backlog
        if run is not None:
            return self._progress(run)
        return Progress(queue_position=self._num_before() + backlog.position(job_id)) if job_id in backlog else None

    async def follow(self, job_id: str) -> AsyncIterator[JobEvent]:
        """Yield what a job is now and what becomes of it, to its end; a slow reader misses steps, nothing else.

        It ends without a last event if the server stops before the job does, or another server has claimed it. Nothing
        is yielded for an unknown id.
        """
        runs, backlog = self._runner.runs, self._runner.backlog
        job = None if job_id in runs else await self._runner.store.get(job_id)
        run = runs.get(job_id)  # it may have been taken up meanwhile
        if run is None and job is not None:
            run = backlog.followed.setdefault(job_id, Run(job)) if job_id in backlog else Run(job, over=True)
        if run is None:
            return
        told: JobEvent | None = None
        while True:
            changed = run.changed
            for event in self._news(run, told):
                told = event
                yield event
            if run.changed is not changed:
                continue
            if run.job.finished or run.over:
                return
            await changed.wait()

    def _progress(self, run: Run) -> Progress:
        if run.ticket is not None:
            return run.ticket.progress
        if run.job.id not in self._runner.runs:
            return self.progress(run.job.id) or Progress()
        before = self._num_before(run)
        return Progress(queue_position=before + len(self._runner.backlog) if run.is_new else before)

    def _num_before(self, run: Run | None = None) -> int:
        """Return how many requests are before a job, or before the backlog: in the engine's queue, and for it."""
        waiting = [other for other in self._runner.runs.values() if other.ticket is None]
        earlier = [other for other in waiting if not other.is_new]
        later = [other for other in waiting if other.is_new] if run is not None and run.is_new else []
        ahead = itertools.takewhile(lambda other: other is not run, [*earlier, *later])
        return self._runner.engine.stats.num_waiting + sum(1 for _ in ahead)

    def _news(self, run: Run, told: JobEvent | None) -> Iterator[JobEvent]:
        """Yield the events that lead from what was told last to what is now."""
        job, progress = run.job, self._progress(run)
        if job.state == progress.state == "queued" and (told is None or told.progress != progress):
            yield JobEvent("queued", job, progress)
        if job.attempts and not (told is None and job.finished) and job.attempts != (told.job.attempts if told else 0):
            yield JobEvent("started", job, progress)
        elif job.state == "in_progress" and told is not None and told.progress != progress:
            yield JobEvent("step", job, progress)
        if job.state in ("completed", "failed"):
            yield JobEvent(job.state, job, progress)
