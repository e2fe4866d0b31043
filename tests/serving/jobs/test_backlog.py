"""A start with more unfinished jobs than fit into memory: they wait in the store, and are taken up in their order."""

from __future__ import annotations

import asyncio
import subprocess
import sys

import pytest

from safelight.core.tenant import Tenant
from safelight.errors import QueueFullError
from safelight.serving.jobs.backlog import Backlog
from tests.serving.job_server import serving, unfinished

MEASURE = """
import asyncio, pathlib, sys
import msgspec
from safelight.serving.jobs.manager import JobManager
from safelight.serving.jobs.job import Job, JobError, new_id
from safelight.serving.jobs.folder import FolderFiles
from safelight.serving.jobs.sqlite import SqliteJobStore
from tests.serving.stub_engine import StubEngine

folder, what, count, size = pathlib.Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]), int(sys.argv[5])

def kib(name):
    return int(open("/proc/self/status").read().partition(name + ":")[2].split()[0])

async def fill():
    store = SqliteJobStore(folder)
    def add():
        execute = store._connection.execute
        execute("PRAGMA synchronous = OFF")
        from safelight.serving.jobs import sqlite as sql
        execute("BEGIN")
        for n in range(count):
            job = Job(id=new_id("image"), kind="image", model="stub/pictures", created_at=1.0,
                      params={"prompt": f"{n} [hold]", "seed": n, "n": 1, "height": 64, "width": 96,
                              "num_inference_steps": 4, "guidance_scale": 1.0}, request={"size": "x" * size})
            if what == "finished":
                job = msgspec.structs.replace(job.failed(JobError("cancelled", "c")), completed_at=2.0, expires_at=1e12)
            execute(sql._INSERT, sql._row(job))
        execute("COMMIT")
    await store._call(add)
    await store.close()

async def start():
    engine = StubEngine(max_waiting=1000)
    manager = JobManager(SqliteJobStore(folder), FolderFiles(folder / "outputs"), engine)
    before = kib("VmRSS")
    await manager.start()
    for _ in range(200):
        await asyncio.sleep(0.01)
        if what == "finished" or engine.submitted:
            break
    await asyncio.sleep(1.0)
    assert what == "finished" or engine.submitted
    print(kib("VmHWM") - before)
    await manager.close(0.0)
    await engine.aclose()

asyncio.run(fill() if sys.argv[1] == "fill" else start())
"""


def megabytes(tmp_path, what, count, size):
    arguments = [str(tmp_path), what, str(count), str(size)]
    for step in ("fill", "start"):
        done = subprocess.run(
            [sys.executable, "-c", MEASURE, step, *arguments], capture_output=True, text=True, timeout=400
        )
        assert done.returncode == 0, done.stderr[-2000:]
    return int(done.stdout) / 1024


@pytest.mark.slow
@pytest.mark.parametrize("what", ["unfinished", "finished"])
@pytest.mark.parametrize(("count", "size"), [(5_000, 100_000), (50_000, 300)])
def test_memory_of_a_start(tmp_path, what, count, size):
    found = megabytes(tmp_path, what, count, size)
    print(f"{count} {what} jobs of {size} bytes: {found:.0f} MB")
    assert found < 60


def test_a_start_holds_few_jobs(tmp_path):
    """Four are in memory, and all are run, in their order; what comes later comes after them."""

    async def leave(server):
        return [await server.submit(f"{n} [hold]") for n in range(40)]

    async def look(server):
        assert len(server.jobs.runner.runs) <= 4 and len(server.jobs.runner.backlog) >= 36
        watched = asyncio.create_task(server.end(left[30]))
        new = await server.submit("new")
        await asyncio.sleep(0.1)
        assert len(server.jobs.runner.runs) <= 5
        assert server.jobs.events.progress(left[39].id).queue_position == 39 - len(server.engine._running)
        assert server.jobs.events.progress(new.id).queue_position == 40 - len(server.engine._running)
        assert (await server.jobs.cancel(left[38].id)).state == "failed"
        assert await server.jobs.delete(left[37].id)
        server.engine.release()
        assert (await watched).state == "completed"
        assert (await server.end(new)).state == "completed"
        while await unfinished(server.store):  # the one before is being written
            await asyncio.sleep(0.01)
        order = [request.params.prompt for request in server.engine.submitted]
        expected = [f"{n} [hold]" for n in range(40) if n not in (37, 38)]
        assert order == [*expected, "new"]

    left = serving(tmp_path, leave)
    serving(tmp_path, look, max_taken=4)


def test_jobs_that_wait_in_the_store_count(tmp_path):
    async def leave(server):
        for n in range(10):
            await server.submit(f"{n} [hold]")

    async def refused(server):
        await asyncio.sleep(0.05)
        with pytest.raises(QueueFullError):
            await server.submit("one more")
        server.engine.release()
        while await unfinished(server.store):
            await asyncio.sleep(0.01)
        assert (await server.end(await server.submit("one more"))).state == "completed"

    serving(tmp_path, leave)
    serving(tmp_path, refused, max_taken=2, max_unfinished=10)


def test_whoever_follows_a_job_that_waits_is_told_all(tmp_path):
    async def leave(server):
        return [await server.submit(f"{n} [hold]") for n in range(8)]

    async def look(server):
        async def follow(job):
            return [event.type async for event in server.jobs.events.follow(job.id)]

        await asyncio.sleep(0.05)
        tasks = [asyncio.create_task(follow(job)) for job in left[4:]]
        gone = asyncio.create_task(follow(left[3]))
        await asyncio.sleep(0.05)
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
        await server.jobs.cancel(left[7].id)
        assert (await tasks[3])[-1] == "failed"
        server.engine.release()
        for task in tasks[:3]:
            types = await task
            assert types[0] == "queued" and "started" in types and types[-1] == "completed"

    async def stop(server):
        await asyncio.sleep(0.05)
        task = asyncio.create_task(collect(server.jobs.events.follow(left[5].id)))
        await asyncio.sleep(0.05)
        await server.jobs.close(0.0)
        assert [event.type for event in await asyncio.wait_for(task, 5)][-1] == "queued"
        server.jobs.close = nothing

    async def collect(events):
        return [event async for event in events]

    async def nothing(drain):
        pass

    left = serving(tmp_path, leave)
    serving(tmp_path, stop, max_taken=1)
    serving(tmp_path, look, max_taken=1)


def test_a_damaged_record_stops_nobody_else(tmp_path, caplog):
    async def leave(server):
        return [await server.submit(f"{n} [hold]") for n in range(3)]

    async def damage(server):
        await server.store._call(
            server.store._connection.execute, "UPDATE jobs SET record = '{}' WHERE id = ?", (left[0].id,)
        )

    async def look(server):
        server.engine.release()
        for job in left[1:]:
            assert (await server.end(job)).state == "completed"
        assert left[0].id in caplog.text

    left = serving(tmp_path, leave)
    serving(tmp_path, damage, start=False)
    serving(tmp_path, look, max_taken=1)


def test_owners_take_turns():
    backlog, order = Backlog(), []
    backlog.extend({"a1": "a", "a2": "a", "a3": "a", "b1": "b", "c1": "c", "c2": "c"})
    backlog.extend({"a4": "a", "b1": "b"})
    left = ["a1", "b1", "c1", "a2", "c2", "a3", "a4"]
    while (first := backlog.first) is not None:
        assert [backlog.num_before(job_id) for job_id in left] == list(range(len(left)))
        backlog.drop(first)
        order.append(first)
        left.remove(first)
    assert order == ["a1", "b1", "c1", "a2", "c2", "a3", "a4"] and backlog.num_before("a1") is None


def test_what_is_dropped_out_of_turn_moves_no_other():
    backlog = Backlog()
    backlog.extend({"a1": "a", "a2": "a", "b1": "b", "b2": "b"})
    backlog.drop("b1")
    backlog.drop("unknown")
    assert backlog.first == "a1" and [backlog.num_before(each) for each in ("a1", "b2", "a2")] == [0, 1, 2]
    assert backlog.num_before_new("a") == 3 and backlog.num_before_new("c") == 0


def test_a_restart_with_jobs_of_several_takes_them_up_in_turns(tmp_path):
    """Few are in memory at a time: nobody's wait for all of another's, whoever came first, and new ones neither."""

    async def leave(server):
        for owner, number in (("loud", 20), ("quiet", 3)):
            for n in range(number):
                await server.submit(f"{owner} {n} [hold]", owner=owner)

    async def look(server):
        await server.submit("other", owner="other")
        while await unfinished(server.store):
            server.engine.release()
            await asyncio.sleep(0.01)
        return [request.params.prompt.split()[0] for request in server.engine.submitted]

    tenants = {owner: Tenant(owner, 0.3) for owner in ("loud", "quiet", "other")}
    serving(tmp_path, leave, tenants=tenants)
    order = serving(tmp_path, look, max_taken=4, max_submitted=4, tenants=tenants)
    assert order.count("loud") == 20 and order.count("quiet") == 3
    assert max(index for index, owner in enumerate(order) if owner != "loud") < 10, order
