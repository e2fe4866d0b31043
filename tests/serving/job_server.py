"""Jobs over one state directory and the engine without a model: what tests of jobs share."""

from __future__ import annotations

import asyncio
import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from safelight.core.params import SamplingParams
from safelight.preparation import prepare
from safelight.serving.admission import Admission
from safelight.serving.clocks import Clocks, Moment
from safelight.serving.directories import MARKER
from safelight.serving.http.spool import Stored
from safelight.serving.jobs.folder import FolderFiles
from safelight.serving.jobs.inputs import new_job
from safelight.serving.jobs.job import Job
from safelight.serving.jobs.limits import JobLimits
from safelight.serving.jobs.manager import JobManager
from safelight.serving.jobs.sqlite import SqliteJobStore
from tests.serving.stub_engine import StubEngine

SECONDS = 20.0
"""More than any wait of these tests takes."""


class Clock:
    """Seconds that pass when they are told to: `now` for people, which may be set, and what passes."""

    def __init__(self) -> None:
        self.now, self.boot, self._set_by = 1000.0, "boot", 0.0

    def __call__(self) -> float:
        return self.now

    def set(self, now: float) -> None:
        """Say another time, though none passes."""
        self._set_by += now - self.now
        self.now = now

    def moment(self) -> Moment:
        return Moment(self.boot, self.now - self._set_by)


class Server:
    """A store, outputs, an engine and their manager over one state directory."""

    def __init__(self, state: Path, engine: StubEngine, **limits: Any) -> None:
        self.state, self.engine, self.clock = state, engine, Clock()
        self.store = SqliteJobStore(state)
        self.outputs = FolderFiles(state / "outputs")
        limits.setdefault("retry_seconds", 0.01)
        clocks = Clocks(self.clock, self.clock.moment)
        self.jobs = JobManager(self.store, self.outputs, engine, JobLimits(**limits), clocks)

    async def submit(self, prompt: str = "a", key: str | None = None, digest: str = "", **fields: Any) -> Job:
        return await self.jobs.acceptance.submit(*submission(self.engine, prompt, key, digest, **fields))

    async def get(self, job_id: str) -> Job:
        job = await self.store.get(job_id)
        assert job is not None
        return job

    async def end(self, job: Job) -> Job:
        """Wait for the end of a job."""
        async for _ in self.jobs.events.follow(job.id):
            pass
        return await self.get(job.id)

    async def until_step(self, job: Job, step: int) -> None:
        """Wait until a job is stored as begun, and has done so many steps."""
        async for event in self.jobs.events.follow(job.id):
            if event.job.state == "in_progress" and event.progress.step >= step:
                return
        raise AssertionError("it ended before")

    def files(self) -> set[str]:
        return {path.name for path in (self.state / "outputs").iterdir()} - {MARKER}

    def pixels(self, job: Job, index: int = 0) -> Any:
        with Image.open(self.outputs.path(job.outputs[index].name)) as image:
            return np.asarray(image)


def prepared(engine: StubEngine, prompt="a", images=None, **fields: Any) -> tuple[SamplingParams, list[str]]:
    """Return resolved parameters and what the user should know of them; images are files, by field."""
    opened = {name: [Image.open(io.BytesIO(data)) for data in datas] for name, datas in (images or {}).items()}
    given = {name: pictures if name == "image" else pictures[0] for name, pictures in opened.items()}
    return prepare(engine._schema, {"prompt": prompt, **given, **fields})


def submission(
    engine: StubEngine, prompt="a", key=None, digest="", images=None, owner="", priority=0, compression=None, **fields
) -> tuple[Job, dict[str, bytes | Stored], Admission]:
    """Return a job that is to be accepted, its files, and as what it may be run."""
    schema = engine._schema
    output_format = fields.pop("output_format", "mp4" if schema.task.makes_video else "png")
    params, warnings = prepared(engine, prompt, images, **fields)
    admission = Admission(owner=owner, priority=priority)
    asked = {"output_format": output_format, "compression": compression, "warnings": tuple(warnings)}
    asked |= {"owner": owner, "priority": priority, "idempotency_key": key, "digest": digest}
    return *new_job(params, schema, images or {}, **asked), admission


def serving(state: Path, use, engine: StubEngine | None = None, drain: float = 0.0, start: bool = True, **limits):
    """Run a test against a server, with a limit of time; close it in the end, whatever happens."""

    async def main():
        server = Server(state, engine or StubEngine(), **limits)
        try:
            if start:
                await server.jobs.start()
            async with asyncio.timeout(SECONDS):
                return await use(server)
        finally:
            await server.jobs.close(drain)
            await server.engine.aclose()

    return asyncio.run(main())


def picture(size=(40, 30), mode="RGB", form="PNG", colour="red") -> bytes:
    file = io.BytesIO()
    Image.new(mode, size, colour).save(file, format=form)
    return file.getvalue()


async def every(store: SqliteJobStore) -> list[Job]:
    """Return every job, in the order of acceptance."""
    page = await store.page(limit=100, order="asc")
    found = page.jobs
    while page.has_more:
        page = await store.page(limit=100, after=found[-1].id, order="asc")
        found += page.jobs
    return found


async def file_names(store: SqliteJobStore) -> set[str]:
    """Return the names of all jobs' files."""
    return {file.name for job in await every(store) for file in job.files}


async def unfinished(store: SqliteJobStore) -> list[Job]:
    """Return every job that waits or runs."""
    return [job for job in await every(store) if not job.finished]


async def collect(events):
    return [event async for event in events]
