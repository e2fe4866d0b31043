"""From an accepted job to its one end: durable before it is acknowledged, run, written, and recovered. No torch.

**Attempts.** An attempt is a run that the store knows to have begun: with the engine's word that it runs, the counter
goes up, in the same transaction as the state. After a death that the engine blames on a request it answers
`WorkerLostError` and never runs it again of its own accord: what comes next is decided here, from the one counter that
also outlives this process. A job that has begun twice and was not finished fails as `worker_lost`, whichever process
died. What a death only interrupted (the engine runs it again and answers nothing) and what waited costs no attempt. A
clean stop that does not wait for a job's end does cost one.

**Who ends a job** is decided by the store: whoever changes its state first. Whoever comes second gives up what it has.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import logging
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeVar

from safelight.core.params import SamplingParams
from safelight.core.schema import ModelSchema
from safelight.errors import (
    CancelledError,
    NotReadyError,
    QueueFullError,
    SafelightError,
    StateDirectoryError,
    StorageBusyError,
    StorageError,
    StorageFailedError,
    StorageFullError,
    WorkerLostError,
)
from safelight.runtime.client import EngineClient, GenerationRequest, Output, Progress, Ticket, total_timings
from safelight.serving.admission import Queue
from safelight.serving.backlog import Backlog
from safelight.serving.clocks import Clocks
from safelight.serving.job_runs import JobEvent, JobLimits, Run
from safelight.serving.jobs import MAX_ATTEMPTS, Job, JobError, JobStore, check_same
from safelight.serving.outputs import Outputs, Staged
from safelight.serving.patience import Expiry, when_free
from safelight.serving.room import Room
from safelight.serving.spool import Stored
from safelight.serving.submission import Submission, new_job, read_params

T = TypeVar("T")
logger = logging.getLogger(__name__)

INTERNAL_ERROR = JobError(SafelightError.code, "the server made a mistake; its log has it by this job's id")
CANCELLED = JobError(CancelledError.code, "the job was cancelled")
_OF_A_STOP = (CancelledError, NotReadyError, StorageBusyError, StorageFailedError, WorkerLostError)
"""What ends a run when the server stops, and not its job, which is the next server's."""
WORKER_LOST = JobError(WorkerLostError.code, f"worker or server died while this job ran, {MAX_ATTEMPTS} times")
JOBS_A_TRIM = 64
"""Jobs after which the bound on records is looked at."""
_STOP_SECONDS = 5.0
"""What a stopped job has to end; a step may take longer, and is then left to itself."""


class JobManager:
    """Runs the jobs of one store on one engine. Its methods are for the event loop's thread."""

    def __init__(
        self,
        store: JobStore,
        outputs: Outputs,
        engine: EngineClient,
        limits: JobLimits | None = None,
        clocks: Clocks | None = None,
    ) -> None:
        self.store = store
        self.outputs = outputs
        self._engine = engine
        self._clocks = clocks or Clocks()
        self._num_accepted = 0
        self._limits = limits or JobLimits()
        self.expiry = Expiry(self._clocks, self._limits.keep_seconds)
        self._room = Room(store, outputs, self.expiry, self._limits)
        self._backlog = Backlog()
        self._runs: dict[str, Run] = {}
        self._gate = asyncio.Lock()  # first come, first served: the order of acceptance
        self._left = asyncio.Event()  # a job has left the engine
        self._background: set[asyncio.Task[Any]] = set()
        self._tasks: list[asyncio.Task[None]] = []
        self._closing = False

    async def start(self) -> None:
        """Remove what a dead server left, take up its jobs, and begin to run them. Nothing is done a second time.

        Raises:
            StateDirectoryError: if the directories cannot be read and written.

        """
        if self._tasks:
            return
        try:
            await self._take_over()
        except StorageError as error:
            raise StateDirectoryError(f"state directory: {self.store.where!r} cannot be used: {error}") from error
        self._tasks = [
            asyncio.create_task(self._sweep_forever(), name="sweep jobs"),
            asyncio.create_task(self._take_up(), name="take up jobs"),
        ]

    async def _take_over(self) -> None:
        self.expiry.begin(await self.store.last_end())
        unfinished = await self.store.unfinished()
        for waiting in unfinished:
            if waiting.attempts >= MAX_ATTEMPTS:
                job = await self.store.get(waiting.id)
                assert job is not None
                await self.store.replace(job, self._failed(job, WORKER_LOST))
        await self.outputs.clean(self.store.kept)
        await self.store.forget(())
        self._backlog.begin(waiting.id for waiting in unfinished if waiting.attempts < MAX_ATTEMPTS)

    async def _take_up(self) -> None:
        """Run the jobs of an earlier server, of which a few are in memory at a time."""
        places = asyncio.Semaphore(self._limits.max_taken)
        while (job_id := self._backlog.first) is not None:
            await places.acquire()
            try:
                job = await self._when_free(functools.partial(self.store.get, job_id), math.inf)
            except StorageError:  # the server stops
                return
            except Exception:  # a job's boundary: its record is damaged, and the others' are not
                logger.exception("job %s cannot be read", job_id)
                job = None
            if job is None or job.finished or job_id not in self._backlog:
                places.release()
            else:
                self._launch(self._backlog.run(job), lambda _: places.release())
            self._backlog.drop(job_id)  # after the launch: with the last one, what came later is let go

    async def submit(self, submission: Submission) -> Job:
        """Accept a job: it is durable when this returns. Whoever asks twice with one idempotency key has one job.

        Raises:
            ConflictError: if the idempotency key came with another request.
            QueueFullError: if as many jobs are unfinished as may be.
            StorageFullError: if there is no room for it.
            NotReadyError: if the model is not known yet, or the server stops.

        """
        if submission.idempotency_key is not None:
            existing = await self.store.find(submission.admission.owner, submission.idempotency_key)
            if existing is not None:
                return check_same(existing, submission.digest)
        schema = self._engine.schema
        if self._closing or schema is None:
            raise NotReadyError("the server stops" if self._closing else "the model is being loaded")
        num_unfinished = len(self._runs) + len(self._background) + len(self._backlog)
        if num_unfinished >= self._limits.max_unfinished:
            raise QueueFullError(f"{self._limits.max_unfinished} jobs wait already")
        clients = [run.client for run in self._runs.values()]
        submission.admission.check_place(Queue(self._limits.max_unfinished, num_unfinished, clients))
        job, files = new_job(submission, schema, self._clocks.stamp(), self._clocks.moment())
        # A caller that goes away leaves no job behind that is stored and never run.
        task = asyncio.create_task(self._accept(job, files, submission.admission.client))
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        return await asyncio.shield(task)

    async def cancel(self, job_id: str) -> Job | None:
        """End a job as `failed`, with the code `cancelled`; one that has finished stays as it is.

        Returns:
            the job, finished; None if there is none.

        Raises:
            StorageFullError: if that cannot be written down; nothing has changed then.

        """
        while True:
            job = await self.store.get(job_id)
            if job is None or job.finished:
                return job
            failed = self._failed(job, CANCELLED)
            if await self._replace(job, failed, self._limits.busy_seconds):
                break
        run = self._runs.get(job_id) or self._backlog.followed_as(job_id)
        self._backlog.drop(job_id)
        if run is not None:
            self._show(run, failed)
            self._stop(run)
        return failed

    async def delete(self, job_id: str) -> bool:
        """Remove a job and its files, and stop it if it runs; say whether there was one.

        Raises:
            StorageFullError: if an unfinished one cannot be ended because the disk is full.

        """
        job = await self.cancel(job_id)
        return job is not None and await self._room.remove(job)

    def progress(self, job_id: str) -> Progress | None:
        """Return how far an unfinished job is; None for every other."""
        run = self._runs.get(job_id)
        if run is None and job_id in self._backlog:
            return Progress(queue_position=self._num_before() + self._backlog.position(job_id))
        return None if run is None else self._progress(run)

    async def events(self, job_id: str) -> AsyncIterator[JobEvent]:
        """Yield what a job is now and what becomes of it, to its end; a slow reader misses steps, nothing else.

        It ends without a last event if the server stops before the job does. Nothing is yielded for an unknown id.
        """
        job = None if job_id in self._runs else await self.store.get(job_id)
        run = self._runs.get(job_id)  # it may have been taken up meanwhile
        if run is None and job is not None and job_id in self._backlog:
            run = self._backlog.follow(job)
        elif run is None and job is not None:
            run = Run(job)
            run.over = True
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

    async def sweep(self) -> None:
        """Remove what has expired, and what is over the quota."""
        await self._room.sweep(self._runs.keys())

    async def close(self, drain: float) -> None:
        """Stop: what waits stays in the store, and what runs has `drain` seconds to finish. Then close the store.

        What has not finished by then stays in progress, and has its next attempt when a server starts.
        """
        self._closing = True
        for task in self._tasks:
            task.cancel()
        self._backlog.close()
        for run in list(self._runs.values()):
            if not run.running:
                self._stop(run)
        await self._wait(drain)
        for run in list(self._runs.values()):
            self._stop(run)
            if run.task is not None:
                run.task.cancel()
        await self._wait(_STOP_SECONDS)
        await self.outputs.close()
        await self.store.close()

    async def _wait(self, seconds: float) -> None:
        tasks = [*(run.task for run in self._runs.values()), *self._tasks, *self._background]
        waited = [task for task in tasks if task is not None]
        if waited:
            await asyncio.wait(waited, timeout=seconds)

    async def _accept(self, job: Job, files: Mapping[str, bytes | Stored], client: str) -> Job:
        self._num_accepted += 1
        with self._room.held(job):
            async with self._room.lock:
                if self._num_accepted % JOBS_A_TRIM == 0:
                    await self._room.trim_records()
                await self._room.make(job.num_bytes)
                if files:
                    await self.store.announce(job.id)
                    await self.outputs.save(files)
            return await self._add(job, files, client)

    async def _add(self, job: Job, files: Mapping[str, bytes | Stored], client: str) -> Job:
        try:
            accepted = await self._when_free(lambda: self.store.add(job), self._limits.busy_seconds)
        except SafelightError:  # after anything else it may be stored all the same, and needs its files
            await self._room.remove_files(job.id, files)
            raise
        if accepted is not job:
            await self._room.remove_files(job.id, files)
        elif not self._closing:
            self._launch(Run(job, client, is_new=True))
        return accepted

    def _launch(self, run: Run, then: Callable[[asyncio.Task[None]], None] = lambda _: None) -> None:
        self._runs[run.job.id] = run
        run.task = asyncio.create_task(self._run(run), name=run.job.id)
        run.task.add_done_callback(lambda task: self._ended(run, task))
        run.task.add_done_callback(then)

    def _ended(self, run: Run, task: asyncio.Task[None]) -> None:
        """Forget a run; here and not in the task, which never begins if it is cancelled at once."""
        del self._runs[run.job.id]
        run.over = True
        run.wake()
        self._wake_waiting()
        if not task.cancelled() and task.exception() is not None:
            logger.error("job %s could not be ended; the next start takes it up", run.job.id, exc_info=task.exception())

    def _stop(self, run: Run) -> None:
        """End what is done for a job, except the writing of its outputs, which is given up at its end."""
        if run.ticket is not None and not run.ticket.done:
            self._engine.cancel(run.ticket.request.request_id)
        elif run.ticket is None and run.task is not None:
            run.task.cancel()

    async def _run(self, run: Run) -> None:
        """Carry a job to its end: the boundary that no error passes."""
        try:
            await self._carry_out(run)
        except SafelightError as error:
            # The engine answers so to what it is made to drop; such a job is the next server's.
            if not (self._closing and isinstance(error, _OF_A_STOP)):
                if error.code == INTERNAL_ERROR.code:
                    logger.error("job %s: %s", _named(run.job), error, exc_info=error.__cause__)
                await self._fail(run, JobError(error.code, str(error), error.param))
        except Exception:
            logger.exception("job %s", _named(run.job))
            await self._fail(run, INTERNAL_ERROR)

    async def _carry_out(self, run: Run) -> None:
        while True:
            run.ticket = None
            run.ticket = await self._enter(run)
            self._wake_waiting()
            try:
                outputs = await self._follow(run, run.ticket)
            except (WorkerLostError, NotReadyError):
                if self._closing:
                    raise
                if run.job.attempts >= MAX_ATTEMPTS:
                    raise WorkerLostError(WORKER_LOST.message) from None
            else:
                await self._finish(run, outputs)
                return

    async def _enter(self, run: Run) -> Ticket:
        """Put a job into the engine's queue, after the jobs before it, as soon as there is room."""
        params: SamplingParams | None = None
        if run.is_new:
            await self._backlog.over.wait()
        async with self._gate:
            while True:
                self._left.clear()
                with contextlib.suppress(QueueFullError, NotReadyError):
                    schema = self._engine.schema
                    if schema is not None and self._may_submit(run.job):
                        params = params or await self._read(run.job, schema)
                        name = f"{run.job.id}.{run.job.attempts + 1}.{run.job.request_id}"
                        return self._engine.submit(GenerationRequest(name, params, run.job.priority, mode=run.job.mode))
                # The engine tells nobody when it becomes ready, or when it has room after somebody else's request.
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._left.wait(), self._limits.retry_seconds)

    def _may_submit(self, job: Job) -> bool:
        submitted = [run.job for run in self._runs.values() if run.ticket is not None and not run.ticket.done]
        held = sum(file.num_bytes for each in (*submitted, job) for file in each.inputs)
        is_small = not submitted or held <= self._limits.max_submitted_bytes
        return is_small and len(submitted) < self._limits.max_submitted

    async def _read(self, job: Job, schema: ModelSchema) -> SamplingParams:
        paths = [self.outputs.path(file.name) for file in job.inputs]
        return await self.outputs.run(read_params, job, schema, paths)

    async def _follow(self, run: Run, ticket: Ticket) -> list[Output]:
        """Wait for the engine's answer, and record that the job has begun once it has."""
        begun = False
        try:
            async for progress in ticket.changes():
                if progress.state == "running" and not begun:
                    begun = await self._advance(run, self._begun(run, progress))
                run.wake()
            outputs = await ticket.result()
        except WorkerLostError:  # it had begun, if only for a moment
            begun = begun or await self._advance(run, self._begun(run, ticket.progress))
            raise
        finally:
            self._left.set()
            self._engine.cancel(ticket.request.request_id)
        if not begun:
            await self._advance(run, self._begun(run, ticket.progress))
        return outputs

    async def _finish(self, run: Run, outputs: Sequence[Output]) -> None:
        """Write the outputs, and complete the job once they are on the disk."""
        began, job, schema = time.perf_counter(), run.job, self._engine.schema
        assert schema is not None
        staged = await self.outputs.stage(job.id, outputs, job.output_format, job.compression, schema)
        async with self._room.lock:
            try:
                await self._when_free(lambda: self._room.make(staged.num_bytes), math.inf)
            except SafelightError:
                await self.outputs.discard(staged)
                raise
            await self.outputs.publish(staged)
            timings = {**total_timings(outputs), "encoding": time.perf_counter() - began}
            await self._complete(run, staged, [text for output in outputs for text in output.warnings], timings)

    async def _complete(self, run: Run, staged: Staged, warnings: Sequence[str], timings: Mapping[str, float]) -> None:
        now, moment = self._clocks.stamp(), self._clocks.moment()
        done = run.job.completed(staged.outputs, warnings, timings, now, now + self._limits.keep_seconds, moment)
        try:
            completed = await self._advance(run, done)
        except (StorageBusyError, StorageFullError):  # after a failure of the disk it may have completed all the same
            await self._room.remove_files(run.job.id, staged.temporaries)
            raise
        if not completed:  # it was cancelled or deleted meanwhile
            await self._room.remove_files(run.job.id, staged.temporaries)

    async def _fail(self, run: Run, error: JobError) -> None:
        failed = self._failed(run.job, error)
        for tried in itertools.count():
            try:
                await self._advance(run, failed)
                break
            except StorageFullError:
                if tried == 0:
                    logger.error("job %s: the disk is too full to write down that it failed", run.job.id)
                await asyncio.sleep(self._limits.retry_seconds)
        if run.job.finished:
            with contextlib.suppress(StorageError):  # the next start removes them
                await self._room.remove_others(run.job, [file.name for file in run.job.files])

    def _failed(self, job: Job, error: JobError) -> Job:
        now = self._clocks.stamp()
        return job.failed(error, now, now + self._limits.keep_seconds, self._clocks.moment())

    def _begun(self, run: Run, progress: Progress) -> Job:
        return run.job.begun(self._clocks.stamp(), progress.mode, self._clocks.moment())

    async def _advance(self, run: Run, new: Job) -> bool:
        """Change a job in the store, and here if the store agreed."""
        if not await self._replace(run.job, new):
            return False
        self._show(run, new)
        return True

    async def _replace(self, old: Job, new: Job, seconds: float = math.inf) -> bool:
        """Change a job in the store, as soon as no other program holds it."""
        return await self._when_free(lambda: self.store.replace(old, new), seconds)

    async def _when_free(self, call: Callable[[], Awaitable[T]], seconds: float) -> T:
        return await when_free(call, seconds, self._limits.retry_seconds, lambda: self._closing)

    def _wake_waiting(self) -> None:
        """Tell the jobs that are held back that they may have moved up."""
        for run in [*self._runs.values(), *self._backlog.followed()]:
            if run.ticket is None:
                run.wake()

    def _show(self, run: Run, job: Job) -> None:
        if not run.job.finished:
            run.job = job
            run.wake()

    async def _sweep_forever(self) -> None:
        while True:
            try:
                await self.sweep()
            except Exception:  # the boundary of this task: a full disk now is no reason not to sweep later
                logger.exception("expired jobs could not be removed")
            await asyncio.sleep(self._limits.sweep_seconds)

    def _progress(self, run: Run) -> Progress:
        if run.ticket is not None:
            return run.ticket.progress
        if run.job.id not in self._runs:
            return self.progress(run.job.id) or Progress()
        if not run.is_new:
            return Progress(queue_position=self._num_before(run))
        return Progress(queue_position=self._num_before(run) + len(self._backlog))

    def _num_before(self, run: Run | None = None) -> int:
        """Return how many requests are before a job, or before the backlog: in the engine's queue, and for it."""
        waiting = [other for other in self._runs.values() if other.ticket is None]
        earlier = [other for other in waiting if not other.is_new]
        later = [other for other in waiting if other.is_new] if run is not None and run.is_new else []
        ahead = itertools.takewhile(lambda other: other is not run, [*earlier, *later])
        return self._engine.stats.num_waiting + sum(1 for _ in ahead)

    def _news(self, run: Run, told: JobEvent | None) -> list[JobEvent]:
        """Return the events that lead from what was told last to what is now."""
        job, progress = run.job, self._progress(run)
        news: list[JobEvent] = []
        if job.state == progress.state == "queued" and (told is None or told.progress != progress):
            news.append(JobEvent("queued", job, progress))
        if job.attempts and not (told is None and job.finished) and job.attempts != (told.job.attempts if told else 0):
            news.append(JobEvent("started", job, progress))
        elif job.state == "in_progress" and told is not None and told.progress != progress:
            news.append(JobEvent("step", job, progress))
        if job.state in ("completed", "failed"):
            news.append(JobEvent(job.state, job, progress))
        return news


def _named(job: Job) -> str:
    """Return how the log names a job: with the id that the client was told of its request."""
    return f"{job.id} of request {job.request_id}"
