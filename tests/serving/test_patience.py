"""A database that another program holds costs time and no work; a clock that is wrong removes nothing."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import subprocess
import sys

import pytest

from safelight.errors import StateDirectoryError, StorageBusyError
from safelight.serving.job_runs import JobLimits
from safelight.serving.patience import GRACE_SECONDS, Expiry
from safelight.serving.sqlite_jobs import SqliteJobStore
from tests.serving.http_server import PROMPT, assert_error, running
from tests.serving.job_server import Server
from tests.serving.stub_engine import StubEngine

DAY = 24 * 3600.0
YEAR = 365 * DAY


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
                task = server.jobs._runs[job.id].task
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


def test_records_of_cancelled_jobs_are_bounded(tmp_path):
    """Ten times as many as there is room for; what completed stays, and without any quota."""
    assert JobLimits().max_record_bytes <= 64 << 20

    async def use():
        server = Server(tmp_path, StubEngine(), max_record_bytes=200_000)
        await server.jobs.start()
        kept = await server.end(await server.submit("kept"))
        for _ in range(256):
            await server.jobs.cancel((await server.submit("x" * 8000 + "[hold]")).id)
        usage = await server.store.usage()
        assert usage.num_bytes_records < 200_000 + 64 * 10_000
        await server.jobs.sweep()
        assert (await server.store.usage()).num_bytes_records <= 200_000
        assert (await server.get(kept.id)).state == "completed"
        await server.jobs.close(1.0)

    asyncio.run(use())


def test_records_count_in_the_quota(tmp_path):
    async def use():
        server = Server(tmp_path, StubEngine(), max_bytes=100_000)
        await server.jobs.start()
        for _ in range(30):
            await server.jobs.cancel((await server.submit("x" * 8000 + "[hold]")).id)
            usage = await server.store.usage()
            assert usage.num_bytes_records <= 100_000 + 10_000
        assert 8 <= len((await server.store.page(limit=100)).jobs) <= 12
        await server.jobs.close(1.0)

    asyncio.run(use())


def test_a_start_reads_one_record_after_the_other(tmp_path):
    """Three hundred jobs of 100 KB: they were 30 MB at once."""
    script = """
import asyncio, sys, pathlib
from safelight.serving.jobs import Job, JobError, StoredFile
from safelight.serving.sqlite_jobs import SqliteJobStore
def kib(): return int(open("/proc/self/status").read().partition("VmHWM:")[2].split()[0])
async def main():
    store = SqliteJobStore(pathlib.Path(sys.argv[1]))
    await store._call(store._connection.execute, "PRAGMA synchronous = OFF")
    for n in range(300):
        job = Job(id=f"image_{n}", kind="image", model="m", params={"prompt": "x" * 100_000}, created_at=1.0)
        await store.add(job)
        await store.replace(job, job.failed(JobError("cancelled", "c"), 2.0, 3.0))
    before = kib()
    assert await store.file_names() == set()
    print(kib() - before)
    await store.close()
asyncio.run(main())
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True, timeout=60
    )
    assert int(done.stdout) < 10 * 1024


class Hands:
    """Two clocks that tests set."""

    def __init__(self, now=1e9):
        self.now, self.passed = now, 50.0

    def go(self, seconds):
        self.now += seconds
        self.passed += seconds

    def expiry(self, last_end):
        found = Expiry(lambda: self.now, lambda: self.passed)
        found.begin(last_end)
        return found


def test_a_clock_that_jumps_removes_nothing():
    hands = Hands()
    expiry = hands.expiry(1e9 - 60)
    hands.now += YEAR
    assert expiry.horizon() == (1e9, None)
    hands.now -= 2 * YEAR
    assert expiry.horizon()[0] < 1e9
    hands.now += YEAR
    hands.go(DAY)
    assert expiry.horizon() == (1e9 + DAY, None)


@pytest.mark.parametrize("last_end", [None, 1e9 - YEAR, 1e9 + YEAR])
def test_a_start_with_another_clock_waits_for_a_day(last_end):
    """What ended before is kept; what ends from now on goes by the time that passes."""
    hands = Hands()
    expiry = hands.expiry(last_end)
    hands.go(GRACE_SECONDS - 1)
    assert expiry.horizon() == (1e9 + GRACE_SECONDS - 1, 1e9)
    hands.go(1)
    assert expiry.horizon() == (1e9 + GRACE_SECONDS, None)


def test_a_server_that_starts_with_a_wrong_clock_keeps_its_jobs(tmp_path):
    async def use(server, now):
        server.clock.now = now
        await server.jobs.start()
        job = await server.end(await server.submit())
        await server.jobs.sweep()
        found = (await server.store.page()).jobs
        await server.jobs.close(1.0)
        return job.id, {each.id for each in found}

    first, _ = asyncio.run(use(Server(tmp_path, StubEngine()), 1e9))
    _, found = asyncio.run(use(Server(tmp_path, StubEngine()), 1e9 + YEAR))
    assert first in found
