"""How a request becomes a job, once and durably, or is refused and leaves nothing."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from safelight.errors import ConflictError, QueueFullError
from safelight.serving.directories import MARKER
from safelight.serving.jobs.sqlite import SqliteJobStore
from tests.serving.disks import as_left_by_a_death
from tests.serving.job_server import file_names, picture, serving, unfinished
from tests.serving.stub_engine import EDIT_SCHEMA, StubEngine


def test_a_job_is_durable_when_it_is_acknowledged(tmp_path):
    async def use(server):
        job = await server.submit(images={"image": [picture()]})
        left = SqliteJobStore(as_left_by_a_death(tmp_path / "state", tmp_path / "left"))
        try:
            assert await left.get(job.id) == job
            assert {path.name for path in (tmp_path / "left" / "outputs").iterdir()} == {job.inputs[0].name, MARKER}
        finally:
            await left.close()

    serving(tmp_path / "state", use, StubEngine(EDIT_SCHEMA, state="restarting"))


def test_too_many_jobs_are_refused_and_leave_nothing(tmp_path):
    async def use(server):
        for _ in range(2):
            await server.submit("[hold]", images={"image": [picture()]})
        with pytest.raises(QueueFullError):
            await server.submit("no", images={"image": [picture()]})
        assert len(server.files()) == len(await unfinished(server.store)) == 2

    serving(tmp_path, use, StubEngine(EDIT_SCHEMA), max_unfinished=2)


def test_one_key_is_one_job_that_runs_once(tmp_path):
    async def use(server):
        same = [server.submit(key="k", digest="d", images={"image": [picture()]}) for _ in range(10)]
        jobs = await asyncio.gather(*same)
        assert len({job.id for job in jobs}) == 1
        await server.end(jobs[0])
        assert len(server.engine.submitted) == 1 and len(server.files()) == 2
        again = await server.submit(key="k", digest="d", images={"image": [picture()]})
        assert again.id == jobs[0].id and again.state == "completed"
        with pytest.raises(ConflictError):
            await server.submit(key="k", digest="e")
        assert len(server.files()) == 2

    serving(tmp_path, use, StubEngine(EDIT_SCHEMA))


def test_a_caller_that_goes_away_leaves_a_whole_job_or_none(tmp_path):
    async def use(server):
        for delay in range(12):
            caller = asyncio.create_task(server.submit(images={"image": [picture()]}))
            for _ in range(delay):
                await asyncio.sleep(0)
            caller.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await caller
        while server.jobs.acceptance.under_way or server.jobs.runner.runs:
            await asyncio.sleep(0.01)
        jobs = (await server.store.page(limit=100)).jobs
        assert jobs and {job.state for job in jobs} == {"completed"}
        assert server.files() == await file_names(server.store)

    serving(tmp_path, use, StubEngine(EDIT_SCHEMA))
