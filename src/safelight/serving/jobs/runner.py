"""From a job that this server holds to its one end: run, written, and recorded. Imports no torch.

**Attempts.** An attempt is a run that the store knows to have begun: with the engine's word that it runs, the counter
goes up, in the same transaction as the state. After a death that the engine blames on a request it answers
`WorkerLostError` and never runs it again of its own accord: what comes next is decided here, from the one counter that
also outlives this process. A job that has begun twice and was not finished fails as `worker_lost`, whichever process
died, or lost its lease. What a death only interrupted (the engine runs it again and answers nothing) and what waited
costs no attempt. A clean stop that does not wait for a job's end does cost one.

**Who ends a job** is decided by the store: whoever changes its state first, and holds it. Whoever comes second gives
up what it has. Two attempts never write files of the same names: what one gives up is not the other's.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from safelight.core.params import SamplingParams
from safelight.core.tenant import NOBODY
from safelight.errors import (
    CancelledError,
    NotReadyError,
    QueueFullError,
    SafelightError,
    StorageBusyError,
    StorageFailedError,
    StorageFullError,
    WorkerLostError,
)
from safelight.runtime.client import EngineClient, GenerationRequest, Output, Progress, Ticket, total_timings
from safelight.serving.clocks import Clocks
from safelight.serving.jobs.backlog import Backlog
from safelight.serving.jobs.expiry import Expiry
from safelight.serving.jobs.fair_queue import FairQueue
from safelight.serving.jobs.files import Files
from safelight.serving.jobs.inputs import read_params
from safelight.serving.jobs.job import MAX_ATTEMPTS, Job, JobError
from safelight.serving.jobs.limits import JobLimits
from safelight.serving.jobs.outputs import write_outputs
from safelight.serving.jobs.retention import Retention
from safelight.serving.jobs.run import Run
from safelight.serving.jobs.store import JobStore

T = TypeVar("T")
logger = logging.getLogger(__name__)

INTERNAL_ERROR = JobError(SafelightError.code, "the server made a mistake; its log has it by this job's id")
CANCELLED = JobError(CancelledError.code, "the job was cancelled")
_OF_A_STOP = (CancelledError, NotReadyError, StorageBusyError, StorageFailedError, WorkerLostError)
"""What ends a run when the server stops or loses it, and not its job, which is the next server's."""
WORKER_LOST = JobError(WorkerLostError.code, f"worker or server died while this job ran, {MAX_ATTEMPTS} times")


class _SupersededError(Exception):
    """The store has another form of a job than this server: somebody ended it, or another server has claimed it."""


class Runner:
    """Runs jobs on one engine. Its methods are for the event loop's thread.

    Args:
        may_begin: whether the lease allows that a job is given to the engine.

    Attributes:
        store, files, engine, retention, expiry, limits, clocks: what it works with.
        runs: by job, what is in memory of those that this server holds.
        backlog: jobs that it may claim.
        queue: of those that wait for the engine.
        stops: whether this server stops, so that what the store refuses is given up.

    """

    def __init__(
        self,
        store: JobStore,
        files: Files,
        engine: EngineClient,
        limits: JobLimits,
        clocks: Clocks,
        may_begin: Callable[[Job], bool],
    ) -> None:
        self.store, self.files, self.engine, self.limits, self.clocks = store, files, engine, limits, clocks
        self.expiry = Expiry(clocks, limits.keep_seconds)
        self.retention = Retention(store, files, self.expiry, limits)
        self._may_begin = may_begin
        self.runs: dict[str, Run] = {}
        self.backlog = Backlog()
        self.stops = False
        self.queue = FairQueue(limits, self._submitted)
        self._left = asyncio.Event()  # a job has left the engine

    def launch(self, run: Run) -> asyncio.Task[None]:
        """Run a job that this server holds, in the task that is returned."""
        self.runs[run.job.id] = run
        run.task = asyncio.create_task(self._run(run), name=run.job.id)
        run.task.add_done_callback(lambda task: self._ended(run, task))
        return run.task

    async def retry(self, call: Callable[[], Awaitable[T]], seconds: float = math.inf) -> T:
        """Return what a call of the store does, again and again while another program holds that, or its disk fails.

        Raises:
            StorageBusyError, StorageFailedError: after so many seconds, or where the server stops.

        """
        begun, is_told = time.monotonic(), False
        while True:
            try:
                return await call()
            except (StorageBusyError, StorageFailedError) as error:
                if self.stops or time.monotonic() - begun >= seconds:
                    raise
                if not is_told:
                    logger.error("%s", error)
                is_told = True
            await asyncio.sleep(self.limits.retry_seconds)

    def stop(self, run: Run) -> None:
        """End what is done for a job, except the writing of its outputs, which is given up at its end."""
        if run.ticket is not None and not run.ticket.done:
            self.engine.cancel(run.ticket.request.request_id)
        elif run.ticket is None and run.task is not None:
            run.task.cancel()

    def end(self, failed: Job) -> None:
        """Stop a job that has been ended in the store, and tell whoever follows it."""
        self.backlog.drop(failed.id)
        if (run := self.runs.get(failed.id)) is not None:
            run.show(failed)
            self.stop(run)

    async def look(self, run: Run) -> None:
        """Tell whoever follows a job that this server does not hold any more what has become of it."""
        run.is_lost = True
        job = await self.retry(lambda: self.store.get(run.job.id))
        if job is None:  # it was deleted, for which it is cancelled first
            job = self.expiry.ended(run.job.failed(CANCELLED))
        if job.finished:
            run.show(job)

    def _ended(self, run: Run, task: asyncio.Task[None]) -> None:
        """Forget a run; here and not in the task, which never begins if it is cancelled at once."""
        del self.runs[run.job.id]
        run.wake()
        self._wake_waiting()
        if not task.cancelled() and task.exception() is not None:
            logger.error("job %s could not be ended; the next start takes it up", run.job.id, exc_info=task.exception())

    async def _run(self, run: Run) -> None:
        """Carry a job to its end: the boundary that no error passes."""
        try:
            await self._carry_out(run)
        except _SupersededError:
            await self.look(run)
        except SafelightError as error:
            # The engine answers so to what it is made to drop; such a job is the next server's.
            if not ((self.stops or run.is_lost) and isinstance(error, _OF_A_STOP)):
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
                if self.stops:
                    raise
                if run.job.attempts >= MAX_ATTEMPTS:
                    raise WorkerLostError(WORKER_LOST.message) from None
            else:
                await self._finish(run, outputs)
                return

    async def _enter(self, run: Run) -> Ticket:
        """Put a job into the engine's queue, when it is the first, as soon as there is room."""
        params: SamplingParams | None = None
        if run.is_new:
            await self.backlog.over(run.job.owner)
        with self.queue.entered(run):
            while True:
                await self.queue.until_first(run)
                self._left.clear()
                with contextlib.suppress(QueueFullError, NotReadyError):
                    schema = self.engine.schema
                    if schema is not None and self._may_begin(run.job) and self._may_submit(run.job):
                        if params is None:
                            params = await self.files.run(read_params, run.job, schema, self.files.open)
                            continue  # the lease may have ended meanwhile
                        name = f"{run.job.id}.{run.job.attempts + 1}.{run.job.request_id}"
                        tenant = self.limits.tenants.get(run.job.owner, NOBODY)
                        return self.engine.submit(
                            GenerationRequest(name, params, run.job.priority, form=run.job.form, tenant=tenant)
                        )
                # The engine tells nobody when it becomes ready, or when it has room after somebody else's request.
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._left.wait(), self.limits.retry_seconds)

    def _submitted(self) -> list[Run]:
        """Return the jobs that the engine has."""
        return [run for run in self.runs.values() if run.ticket is not None and not run.ticket.done]

    def _may_submit(self, job: Job) -> bool:
        submitted = [run.job for run in self._submitted()]
        held = sum(file.num_bytes for each in (*submitted, job) for file in each.inputs)
        is_small = not submitted or held <= self.limits.max_submitted_bytes
        return is_small and (len(submitted) < self.limits.max_submitted or self.queue.is_kept(job.owner))

    async def _follow(self, run: Run, ticket: Ticket) -> list[Output]:
        """Wait for the engine's answer, and record that the job has begun once it has."""
        attempt = run.job.attempts + 1
        try:
            async for progress in ticket.changes():
                if progress.state == "running":
                    await self._begin(run, attempt, progress)
                run.wake()
            outputs = await ticket.result()
        except WorkerLostError:  # it had begun, if only for a moment
            await self._begin(run, attempt, ticket.progress)
            raise
        finally:
            self._left.set()
            self.queue.wake_first()
            self.engine.cancel(ticket.request.request_id)
        await self._begin(run, attempt, ticket.progress)
        return outputs

    async def _finish(self, run: Run, outputs: Sequence[Output]) -> None:
        """Write the outputs, and complete the job once they are on the disk."""
        began, schema = time.perf_counter(), self.engine.schema
        assert schema is not None
        batch, made = await self.files.stage(functools.partial(write_outputs, run.job, outputs, schema))
        files = [file for output in made for file in output.files]
        async with self.retention.lock:
            try:
                await self.retry(lambda: self.retention.make(sum(file.num_bytes for file in files)))
            except SafelightError:
                await self.files.discard(batch)
                raise
            await self.files.publish(batch)
            timings = {**total_timings(outputs), "encoding": time.perf_counter() - began}
            warnings = [text for output in outputs for text in output.warnings]
            try:
                await self._advance(run, self.expiry.ended(run.job.completed(made, warnings, timings)))
            except (_SupersededError, StorageBusyError, StorageFullError):
                # It was cancelled, deleted or claimed meanwhile. After a failure of the disk it may have completed.
                await self.retention.remove_files(run.job.id, [file.name for file in files])
                raise
            await self.retention.remove_others(run.job)

    async def _fail(self, run: Run, error: JobError) -> None:
        failed, is_told = self.expiry.ended(run.job.failed(error)), False
        while True:
            try:
                await self._advance(run, failed)
                break
            except _SupersededError:
                await self.look(run)
                break
            except StorageFullError:
                if not is_told:
                    logger.error("job %s: the disk is too full to write down that it failed", run.job.id)
                is_told = True
                await asyncio.sleep(self.limits.retry_seconds)
        if run.job.finished:
            await self.retention.remove_others(run.job)

    async def _begin(self, run: Run, attempt: int, progress: Progress) -> None:
        """Record that an attempt has begun, unless that has been done."""
        if run.job.attempts < attempt:
            await self._advance(run, run.job.begun(self.clocks.stamp(), progress.form, self.clocks.moment()))

    async def _advance(self, run: Run, new: Job) -> None:
        """Change a job in the store, as soon as no other program holds that, and here if the store agreed.

        Raises:
            _SupersededError: if it did not.

        """
        if not await self.retry(lambda: self.store.replace(run.job, new)):
            raise _SupersededError
        run.show(new)

    def _wake_waiting(self) -> None:
        """Tell the jobs that are held back that they may have moved up."""
        for run in self.runs.values():
            if run.ticket is None:
                run.wake()


def _named(job: Job) -> str:
    """Return how the log names a job: with the id that the client was told of its request."""
    return f"{job.id} of request {job.request_id}"
