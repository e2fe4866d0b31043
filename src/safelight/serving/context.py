"""What every route needs: the engine, the jobs, the settings, and what is done the same way everywhere."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from safelight.core.schema import ModelSchema
from safelight.errors import NotReadyError, SafelightError, UsageError, by_code, nearest, shown
from safelight.runtime.client import EngineClient, Progress
from safelight.serving.addresses import KEY_BYTES, Addresses
from safelight.serving.admission import AdmissionControl
from safelight.serving.http.errors import ModelNameError, NotFoundError, is_internal
from safelight.serving.http.held_bytes import HeldBytes
from safelight.serving.http.spool import LongText
from safelight.serving.jobs.job import Job, Kind
from safelight.serving.jobs.manager import JobManager
from safelight.serving.limits import Limits
from safelight.serving.metrics import Metrics
from safelight.serving.principals import Keys, principal_of

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
        self._followers: set[asyncio.Task[None]] = set()

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
        """Return the schema for a generation of pictures, or of videos and sounds, which is counted from here on."""
        schema = self.schema()
        request.scope["state"]["task"] = schema.task.value
        if schema.task.lasts != makes_video:
            made = "videos" if schema.task.makes_video else "sounds" if schema.task.lasts else "images"
            route = "/v1/videos" if schema.task.lasts else "/v1/images/generations"
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

    def count_job(self, job: Job, task_name: str) -> None:
        """Count what a job will have come to, once it has."""
        task = asyncio.create_task(self._follow(job, task_name), name=f"count {job.id}")
        self._followers.add(task)
        task.add_done_callback(self._followers.discard)

    async def _follow(self, job: Job, task: str) -> None:
        job = await self.finished(job)
        self.count_completed(job, task)
        if job.error is not None:
            self.metrics.failed(task, job_error(job))

    async def finished(self, job: Job) -> Job:
        """Wait for a job's end, and return it as it is then."""
        async for event in self.jobs.events.follow(job.id):
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

    def progress(self, job: Job) -> Progress:
        """Return how far an unfinished job is."""
        return self.jobs.events.progress(job.id) or Progress(num_outputs=0)

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
