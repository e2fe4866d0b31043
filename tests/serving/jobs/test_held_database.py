"""A database that another program holds costs time and no work."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3

import pytest

from safelight.errors import StateDirectoryError, StorageBusyError
from safelight.serving.jobs.limits import JobLimits
from safelight.serving.jobs.sqlite import SqliteJobStore
from tests.serving.http_server import PROMPT, assert_error, running
from tests.serving.job_server import Server
from tests.serving.stub_engine import StubEngine


@contextlib.contextmanager
def held(state):
    """Hold the database as another program would."""
    connection = sqlite3.connect(state / "jobs.sqlite3", isolation_level=None)
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
    finally:
        connection.close()


@pytest.mark.parametrize("until", ["queued", "begun"])
def test_work_that_ends_while_the_database_is_held_is_kept(tmp_path, until):
    """Held for longer than SQLite waits by itself, from before the job begins or while it runs."""

    async def use():
        server = Server(tmp_path, StubEngine(step_seconds=0.01))
        await server.jobs.start()
        try:
            job = await server.submit("x [hold]")
            if until == "begun":
                await server.until_step(job, 2)
            with held(tmp_path):
                server.engine.release()
                await asyncio.sleep(1.5)
                task = server.jobs.runner.runs[job.id].task
                assert task is not None and not task.done()
            ended = await server.end(job)
            assert (ended.state, ended.attempts, len(ended.outputs)) == ("completed", 1, 1)
            assert len(server.engine.submitted) == 1
        finally:
            await server.jobs.close(1.0)

    asyncio.run(use())


def test_a_database_that_is_held_for_a_moment_refuses_nobody(tmp_path):
    """For longer than SQLite waits by itself, and shorter than whoever sends a job has patience."""

    async def use():
        server = Server(tmp_path, StubEngine())
        await server.jobs.start()
        try:
            with held(tmp_path):
                sending = asyncio.create_task(server.submit())
                await asyncio.sleep(1.2)
                assert not sending.done()
            assert (await server.end(await sending)).state == "completed"
        finally:
            await server.jobs.close(1.0)

    asyncio.run(use())


def test_a_database_that_is_held_keeps_a_server_from_starting_and_says_so(tmp_path):
    asyncio.run(SqliteJobStore(tmp_path).close())
    with held(tmp_path), pytest.raises(StateDirectoryError, match="another program holds the jobs' database"):
        SqliteJobStore(tmp_path)
    asyncio.run(SqliteJobStore(tmp_path).close())


def test_whoever_waits_for_an_answer_is_told(tmp_path):
    limits = JobLimits(busy_seconds=0.6, retry_seconds=0.05)
    with running(tmp_path, job_limits=limits) as server, server.http() as http:
        job = http.post(
            "/v1/images/generations", json={"prompt": f"{PROMPT} [hold]"}, headers={"prefer": "respond-async"}
        )
        assert job.status_code == 202 and http.get("/readyz").status_code == 200
        with held(tmp_path / "state"):
            assert assert_error(http.get("/readyz"), 503)["code"] == "not_ready"
            refused = http.post("/v1/images/generations", json={"prompt": PROMPT}, headers={"prefer": "respond-async"})
            assert assert_error(refused, 503)["code"] == StorageBusyError.code
            assert assert_error(http.delete(f"/v1/jobs/{job.json()['id']}"), 503)["code"] == StorageBusyError.code
            assert http.get(f"/v1/jobs/{job.json()['id']}").status_code == 200
        assert http.get("/readyz").status_code == 200
        assert http.delete(f"/v1/jobs/{job.json()['id']}").status_code == 200
