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
import itertools
import logging
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import msgspec

from safelight.core.params import SamplingParams
from safelight.core.schema import ModelSchema
from safelight.errors import (
    CancelledError,
    NotReadyError,
    QueueFullError,
    SafelightError,
    StorageBusyError,
    StorageFullError,
    WorkerLostError,
)
from safelight.runtime.client import EngineClient, GenerationRequest, Output, Progress, Ticket
from safelight.serving.job_runs import JobEvent, JobLimits, Run
from safelight.serving.jobs import MAX_ATTEMPTS, Job, JobError, JobStore, check_same
from safelight.serving.outputs import Outputs, Staged
from safelight.serving.patience import Expiry, when_free
from safelight.serving.shares import check_share
from safelight.serving.spool import Stored
from safelight.serving.submission import Submission, new_job, read_params

T = TypeVar("T")
logger = logging.getLogger(__name__)

INTERNAL_ERROR = JobError(SafelightError.code, "the server made a mistake; its log has it by this job's id")
CANCELLED = JobError(CancelledError.code, "the job was cancelled")
_OF_A_STOP = (CancelledError, NotReadyError, StorageBusyError, WorkerLostError)
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
        clock: Callable[[], float] = time.time,
        limits: JobLimits | None = None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.store = store
        self.outputs = outputs
        self._engine = engine
        self._clock = clock
        self._expiry = Expiry(clock, monotonic)
        self._num_accepted = 0
        self._limits = limits or JobLimits()
        self._runs: dict[str, Run] = {}
        self._gate = asyncio.Lock()  # first come, first served: the order of acceptance
        self._left = asyncio.Event()  # a job has left the engine
        self._room = asyncio.Lock()
        self._background: set[asyncio.Task[Any]] = set()
        self._leaving: set[str] = set()
        """Jobs that are not there yet or any more, and whose files are being written or removed."""
        self._sweeper: asyncio.Task[None] | None = None
        self._closing = False

    async def start(self) -> None:
        """Remove what a dead server left, take up its jobs, and begin to run them.

        Raises:
            StorageFullError: if the disk is full.

        """
        self._expiry.begin(await self.store.last_end())
        unfinished = await self.store.unfinished()
        for job in unfinished:
            if job.attempts >= MAX_ATTEMPTS:
                await self.store.replace(job, self._failed(job, WORKER_LOST))
        await self.outputs.clean(await self.store.file_names(), await self.store.over())
        await self.store.forget(())
        for job in unfinished:
            if job.attempts < MAX_ATTEMPTS:
                self._launch(job)
        self._sweeper = asyncio.create_task(self._sweep_forever(), name="sweep jobs")

    async def submit(self, submission: Submission) -> Job:
        """Accept a job: it is durable when this returns. Whoever asks twice with one idempotency key has one job.

        Raises:
            ConflictError: if the idempotency key came with another request.
            QueueFullError: if as many jobs are unfinished as may be.
            StorageFullError: if there is no room for it.
            NotReadyError: if the model is not known yet, or the server stops.

        """
        if submission.idempotency_key is not None:
            existing = await self.store.find(submission.owner, submission.idempotency_key)
            if existing is not None:
                return check_same(existing, submission.digest)
        schema = self._engine.schema
        if self._closing or schema is None:
            raise NotReadyError("the server stops" if self._closing else "the model is being loaded")
        num_unfinished = len(self._runs) + len(self._background)
        if num_unfinished >= self._limits.max_unfinished:
            raise QueueFullError(f"{self._limits.max_unfinished} jobs wait already")
        clients = [run.client for run in self._runs.values()]
        check_share(submission.client, clients, self._limits.max_unfinished, num_unfinished)
        job, files = new_job(submission, schema, self._clock())
        # A caller that goes away leaves no job behind that is stored and never run.
        task = asyncio.create_task(self._accept(job, files, submission.client))
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
        run = self._runs.get(job_id)
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
        return job is not None and await self._remove(job)

    def progress(self, job_id: str) -> Progress | None:
        """Return how far an unfinished job is; None for every other."""
        run = self._runs.get(job_id)
        return None if run is None else self._progress(run)

    async def events(self, job_id: str) -> AsyncIterator[JobEvent]:
        """Yield what a job is now and what becomes of it, to its end; a slow reader misses steps, nothing else.

        It ends without a last event if the server stops before the job does. Nothing is yielded for an unknown id.
        """
        run = self._runs.get(job_id)
        if run is None:
            job = await self.store.get(job_id)
            run = None if job is None else Run(job)
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
            if run.job.finished or run.over or run.task is None:
                return
            await changed.wait()

    async def sweep(self) -> None:
        """Remove what has expired, and what is over the quota."""
        while expired := await self.store.expired(*self._expiry.horizon()):
            for job in expired:
                await self._remove(job)
        async with self._room:
            await self._make_room(0)
            await self._trim_records()
        await self.store.forget({*self._runs, *self._leaving})

    async def close(self, drain: float) -> None:
        """Stop: what waits stays in the store, and what runs has `drain` seconds to finish. Then close the store.

        What has not finished by then stays in progress, and has its next attempt when a server starts.
        """
        self._closing = True
        if self._sweeper is not None:
            self._sweeper.cancel()
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
        tasks = [*(run.task for run in self._runs.values()), self._sweeper, *self._background]
        waited = [task for task in tasks if task is not None]
        if waited:
            await asyncio.wait(waited, timeout=seconds)

    @contextlib.contextmanager
    def _held(self, job: Job) -> Iterator[None]:
        """Keep the store from forgetting a job that is not there yet or any more: its files are."""
        self._leaving.add(job.id)
        try:
            yield
        finally:
            self._leaving.discard(job.id)

    async def _accept(self, job: Job, files: Mapping[str, bytes | Stored], client: str) -> Job:
        self._num_accepted += 1
        with self._held(job):
            async with self._room:
                if self._num_accepted % JOBS_A_TRIM == 0:
                    await self._trim_records()
                await self._make_room(job.num_bytes)
                if files:
                    await self.store.announce(job.id)
                    await self.outputs.save(files)
            return await self._add(job, files, client)

    async def _add(self, job: Job, files: Mapping[str, bytes | Stored], client: str) -> Job:
        try:
            accepted = await self._when_free(lambda: self.store.add(job), self._limits.busy_seconds)
        except SafelightError:  # after anything else it may be stored all the same, and needs its files
            await self.outputs.remove(files)
            raise
        if accepted is not job:
            await self.outputs.remove(files)
        elif not self._closing:
            self._launch(job, client)
        return accepted

    def _launch(self, job: Job, client: str = "") -> None:
        run = self._runs[job.id] = Run(job, client)
        run.task = asyncio.create_task(self._run(run), name=job.id)
        run.task.add_done_callback(lambda task: self._ended(run, task))

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
        async with self._gate:
            while True:
                self._left.clear()
                with contextlib.suppress(QueueFullError, NotReadyError):
                    schema = self._engine.schema
                    if schema is not None and self._may_submit(run.job):
                        params = params or await self._read(run.job, schema)
                        name = f"{run.job.id}.{run.job.attempts + 1}.{run.job.request_id}"
                        return self._engine.submit(GenerationRequest(name, params, mode=run.job.mode))
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
                    begun = await self._advance(run, run.job.begun(self._clock(), progress.mode))
                run.wake()
            outputs = await ticket.result()
        except WorkerLostError:  # it had begun, if only for a moment
            begun = begun or await self._advance(run, run.job.begun(self._clock(), ticket.progress.mode))
            raise
        finally:
            self._left.set()
            self._engine.cancel(ticket.request.request_id)
        if not begun:
            await self._advance(run, run.job.begun(self._clock(), ticket.progress.mode))
        return outputs

    async def _finish(self, run: Run, outputs: Sequence[Output]) -> None:
        """Write the outputs, and complete the job once they are on the disk."""
        began, job, schema = time.perf_counter(), run.job, self._engine.schema
        assert schema is not None
        staged = await self.outputs.stage(job.id, outputs, job.output_format, job.compression, schema)
        async with self._room:
            try:
                await self._make_room(staged.num_bytes)
            except SafelightError:
                await self.outputs.discard(staged)
                raise
            await self.outputs.publish(staged)
            timings = {**_total(outputs), "encoding": time.perf_counter() - began}
            await self._complete(run, staged, [text for output in outputs for text in output.warnings], timings)

    async def _complete(self, run: Run, staged: Staged, warnings: Sequence[str], timings: Mapping[str, float]) -> None:
        now = self._clock()
        done = run.job.completed(staged.outputs, warnings, timings, now, now + self._limits.keep_seconds)
        try:
            completed = await self._advance(run, done)
        except (StorageBusyError, StorageFullError):
            await self.outputs.remove(staged.temporaries)
            raise
        if not completed:  # it was cancelled or deleted meanwhile
            await self.outputs.remove(staged.temporaries)

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
            await self._remove_others(run.job, [file.name for file in run.job.files])

    def _failed(self, job: Job, error: JobError) -> Job:
        now = self._clock()
        return job.failed(error, now, now + self._limits.keep_seconds)

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
        for run in self._runs.values():
            if run.ticket is None:
                run.wake()

    def _show(self, run: Run, job: Job) -> None:
        if not run.job.finished:
            run.job = job
            run.wake()

    async def _remove(self, job: Job) -> bool:
        """Remove a finished job, and then its files; on a full disk the files first, which makes room for the rest."""
        names = [file.name for file in job.files]
        with self._held(job):
            try:
                removed = await self.store.delete(job.id)
            except StorageFullError:
                await self.outputs.remove(names)
                removed = await self.store.delete(job.id)
            await self.outputs.remove(names)
            await self._remove_others(job, ())
        return removed is not None

    async def _remove_others(self, job: Job, names: Iterable[str]) -> None:
        """Remove what an earlier attempt has left of a job that is over: the server died before that was completed."""
        if job.attempts > 1:
            await self.outputs.remove_others(job.id, names)

    async def _make_room(self, num_bytes: int) -> None:
        """Remove the first finished jobs until so many bytes fit. Only under the lock `_room`.

        Raises:
            StorageFullError: if they never will.

        """
        limit = self._limits.max_bytes
        if limit is None:
            return
        usage = await self.store.usage()
        if num_bytes and usage.num_bytes - usage.num_bytes_finished + num_bytes > limit:
            raise StorageFullError("the files of this job need more room than all jobs may take")
        excess = usage.num_bytes + num_bytes - limit
        while excess > 0 and (removable := await self.store.removable()):
            for job in removable:
                if excess > 0 and await self._remove(job):
                    excess -= job.num_bytes

    async def _trim_records(self) -> None:
        """Remove finished jobs until all records are within their bound. Only under the lock `_room`."""
        excess = (await self.store.usage()).num_bytes_records - self._limits.max_record_bytes
        while excess > 0 and (removable := await self.store.removable(failed_first=True)):
            for job in removable:
                if excess > 0 and await self._remove(job):
                    excess -= len(msgspec.json.encode(job))

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
        before = 0
        for other in self._runs.values():
            if other is run:
                break
            before += other.ticket is None
        return Progress(queue_position=self._engine.stats.num_waiting + before)

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


def _total(outputs: Sequence[Output]) -> dict[str, float]:
    """Return the seconds of each stage, over all outputs."""
    total: dict[str, float] = {}
    for output in outputs:
        for stage, seconds in output.timings.items():
            total[stage] = total.get(stage, 0.0) + seconds
    return total
