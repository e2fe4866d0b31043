"""What every route needs: the engine, the jobs, the settings, and what is done the same way everywhere."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from safelight.core.schema import ModelSchema
from safelight.errors import NotReadyError, SafelightError, UsageError, by_code, nearest, shown
from safelight.runtime.client import EngineClient, GenerationRequest, Output, Progress, Ticket, total_timings
from safelight.serving.addresses import KEY_BYTES, Addresses
from safelight.serving.admission import Admission, AdmissionControl, Queue
from safelight.serving.fields import Resolved
from safelight.serving.http.bodies import HeldBytes
from safelight.serving.http.disconnects import unless_gone
from safelight.serving.http.errors import ModelNameError, NotFoundError, is_internal
from safelight.serving.http.spool import LongText
from safelight.serving.jobs.job import Job, Kind
from safelight.serving.jobs.manager import JobManager
from safelight.serving.limits import Limits
from safelight.serving.metrics import Metrics
from safelight.serving.principals import Keys, principal_of
from safelight.serving.trial import check_all

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """What the API is told once.

    Attributes:
        served_names: under which the model is asked for; the first is the one that answers name.
        keys: of which every route but `/livez`, and those by signed addresses, asks for one, if there are any.
        public_url: where clients reach the server, without a path; None is what their `Host` header says.
        allowed_origins: of web pages that may use the server, as browsers write them; `*` is all.
        allowed_hosts: names that a server without a key answers to, beside this machine's own.
        response_format: how pictures are returned where a request does not say it: `b64_json` or `url`.
        address_key: the secret that signs addresses of files; it has to outlive the process for them to do so.
        closing_seconds: that running jobs have when the application closes, and files that are being written.
        limits: bounds of what clients send and ask for.

    """

    served_names: tuple[str, ...]
    keys: Keys = field(default_factory=Keys)
    public_url: str | None = None
    allowed_origins: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    response_format: str = "b64_json"
    address_key: bytes = field(default_factory=lambda: secrets.token_bytes(KEY_BYTES))
    closing_seconds: float = 30.0
    limits: Limits = field(default_factory=Limits)


@dataclass(frozen=True)
class Finished:
    """What the engine made of a synchronous request, and how long it took, in seconds."""

    outputs: list[Output]
    seconds: float
    queue_seconds: float


class Context:
    """One application's parts. Only for the event loop's thread.

    Attributes:
        engine, jobs, settings, metrics: the parts.
        held: bytes of what clients send.
        addresses: of files, signed.
        admission: decides which requests are taken, and as what.
        event_turn: of whichever stream writes an event: all that follow one job wake at once, and would have the event
            loop until the last of them has written.
        started_at: when the application was made, in seconds since 1970.

    """

    def __init__(self, engine: EngineClient, jobs: JobManager, settings: Settings) -> None:
        self.engine, self.jobs, self.settings = engine, jobs, settings
        self.metrics = Metrics(engine)
        self.held = HeldBytes(settings.limits, jobs.outputs.directory)
        self.addresses = Addresses(settings.address_key, jobs.expiry.now)
        self.admission = AdmissionControl(engine, settings.keys, settings.limits)
        self.started_at = int(time.time())
        self.event_turn = asyncio.Lock()
        # One thread: a picture of 25 megapixels takes 200 MB while it is tried, and no more than one does.
        self._decoder = ThreadPoolExecutor(1, thread_name_prefix="safelight-decoding")
        self._followers: set[asyncio.Task[None]] = set()
        self._waiting: list[tuple[str, Ticket]] = []

    @property
    def limits(self) -> Limits:
        """The bounds."""
        return self.settings.limits

    @property
    def model_name(self) -> str:
        """What answers call the model."""
        return self.settings.served_names[0]

    def schema(self) -> ModelSchema:
        """Return what the model takes.

        Raises:
            NotReadyError: while it is being loaded for the first time.

        """
        if self.engine.schema is None:
            raise NotReadyError("the model is being loaded; try again later")
        return self.engine.schema

    def schema_for(self, request: Request, makes_video: bool) -> ModelSchema:
        """Return the schema for a generation of pictures or of videos, which is counted from here on."""
        schema = self.schema()
        request.scope["state"]["task"] = schema.task.value
        if schema.task.makes_video != makes_video:
            made, route = ("videos", "/v1/videos") if schema.task.makes_video else ("images", "/v1/images/generations")
            raise UsageError(f"this model makes {made}; use {route}")
        return schema

    def check_model(self, name: Any) -> None:
        """Refuse another model's name; a value that is no name is refused with the other fields.

        Raises:
            ModelNameError: naming what is served.

        """
        names = self.settings.served_names
        if isinstance(name, LongText):
            name = name.start
        if isinstance(name, str) and name not in names:
            raise ModelNameError(f"model: {shown(name)} is not served here: {nearest(name, names)}")

    async def try_pictures(self, request: Request, resolved: Resolved) -> None:
        """See that a request's pictures can be decoded: in a thread, one at a time. They are kept as files.

        Raises:
            InvalidParameterError: naming the field of one that is damaged.
            ClientDisconnect: if the client goes away; pictures whose turn has not come are not tried then.

        """
        if resolved.pictures:
            loop = asyncio.get_running_loop()
            await unless_gone(request.receive, loop.run_in_executor(self._decoder, check_all, resolved.pictures))

    def submit(self, request: Request, resolved: Resolved, admission: Admission) -> Ticket:
        """Put a request into the engine's queue that somebody waits for; there too it has the id that they are told.

        Raises:
            ServingError: if it cannot be taken now.

        """
        self._waiting = [(client, ticket) for client, ticket in self._waiting if ticket.waits]
        clients = [client for client, _ in self._waiting]
        admission.check_place(Queue(self.limits.waiting, self.engine.stats.num_waiting, clients))
        asked = GenerationRequest(request_id(request), resolved.params, admission.priority, admission.deadline)
        ticket = self.engine.submit(asked)
        self._waiting.append((admission.client, ticket))
        return ticket

    async def follow(self, ticket: Ticket) -> Finished:
        """Wait for a request's outputs.

        Raises:
            SafelightError: what ended it instead.

        """
        began, queue_seconds = time.perf_counter(), 0.0
        async for progress in ticket.changes():
            if progress.state == "running" and not queue_seconds:
                queue_seconds = time.perf_counter() - began
        outputs = await ticket.result()
        # One that is done has its pictures, which go with the answer.
        self._waiting = [(client, other) for client, other in self._waiting if other.waits]
        return Finished(outputs, time.perf_counter() - began, queue_seconds)

    def count(self, resolved: Resolved, finished: Finished, made: int) -> None:
        """Count what a synchronous request came to, and the pictures that were made."""
        task, timings = resolved.schema.task.value, total_timings(finished.outputs)
        self.metrics.completed(task, finished.seconds, finished.queue_seconds, timings, made)

    def count_job(self, job: Job, task_name: str) -> None:
        """Count what a job will have come to, once it has."""
        task = asyncio.create_task(self._follow(job, task_name), name=f"count {job.id}")
        self._followers.add(task)
        task.add_done_callback(self._followers.discard)

    async def _follow(self, job: Job, task: str) -> None:
        job = await self.finished(job)
        self.count_completed(job, task)
        if job.error is not None:
            error = job_error(job)
            self.metrics.ended(task, error.status)
            self.metrics.answered(error)

    async def finished(self, job: Job) -> Job:
        """Wait for a job's end, and return it as it is then."""
        async for event in self.jobs.events(job.id):
            job = event.job
        return job

    def count_completed(self, job: Job, task: str) -> None:
        """Count a job, if it completed."""
        if job.state == "completed":
            self.metrics.completed(task, job.seconds, job.queue_seconds, job.timings, len(job.outputs))

    async def job(self, request: Request, job_id: str, kind: Kind | None = None) -> Job:
        """Return a job of whoever asks.

        Raises:
            NotFoundError: if there is none of that name and kind, or if it is another's.

        """
        job = await self.jobs.store.get(job_id, principal_of(request).owner)
        if job is None or kind not in (None, job.kind):
            raise NotFoundError(f"there is no {kind or 'job'} of that id")
        return job

    def answered(self, request: Request, error: Exception) -> SafelightError:
        """Count what ended a request, and return it as it may be answered.

        A mistake of ours is told to the log alone, under the id that the client is told.
        """
        known = error if isinstance(error, SafelightError) else SafelightError("this was not foreseen")
        self.metrics.answered(known)
        if is_internal(known):
            cause = error.__cause__ if known is error else error
            logger.error("request %s failed: %s", request_id(request), known, exc_info=cause)
        return known

    def progress(self, job: Job) -> Progress:
        """Return how far an unfinished job is."""
        return self.jobs.progress(job.id) or Progress(num_outputs=0)

    def close(self) -> None:
        """End the thread that decodes pictures; what waits for it is not decoded any more."""
        self._decoder.shutdown(wait=False, cancel_futures=True)

    def base_url(self, request: Request) -> str:
        """Return where this client reaches the server, without a slash at the end."""
        return (self.settings.public_url or str(request.base_url)).rstrip("/")


def request_id(request: Request) -> str:
    """Return what the client is told as `x-request-id`, and finds in the log."""
    return str(request.scope["state"]["request_id"])


def job_error(job: Job) -> SafelightError:
    """Return the error that a job failed with; a mistake of ours names the job, for the log."""
    assert job.error is not None
    error = by_code(job.error.code).rebuilt(job.error.message, job.error.param)
    return SafelightError(f"job {job.id}: {error}") if is_internal(error) else error


def json_response(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Return JSON; msgspec writes pictures in base64 ten times as fast as the standard library."""
    return Response(msgspec.json.encode(content), status, headers, "application/json")


def timestamp(seconds: float | None) -> int | None:
    """Return whole seconds since 1970."""
    return None if seconds is None else int(seconds)
