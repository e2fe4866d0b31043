"""A job keeps the mode that it began with: eager or compiled, when a worker dies and when the server does."""

from __future__ import annotations

import msgspec
import pytest

from safelight.serving.jobs.job import Job
from tests.serving.job_server import serving
from tests.serving.stub_engine import StubEngine

MODES = [("eager", "compiled"), ("compiled", "eager")]


@pytest.mark.parametrize(("first", "now"), MODES)
def test_after_a_workers_death(tmp_path, first, now):
    async def use(server):
        server.engine.mode = first
        job = await server.submit("[die:1] [hold]")
        await server.until_step(job, 1)
        assert (await server.get(job.id)).mode == first
        server.engine.mode = now
        server.engine.release()
        done = await server.end(job)
        assert (done.state, done.attempts, done.mode) == ("completed", 2, first)
        assert [request.mode for request in server.engine.submitted] == [None, first]
        later = await server.end(await server.submit("b"))
        assert later.mode == now

    serving(tmp_path, use)


@pytest.mark.parametrize(("first", "now"), MODES)
def test_after_a_restart_of_the_server(tmp_path, first, now):
    """What had begun keeps its mode; what had only waited begins in the mode of its day."""

    async def die(server):
        server.engine.mode = first
        jobs = [await server.submit("[hold]"), await server.submit("b")]
        await server.until_step(jobs[0], 1)
        return [job.id for job in jobs]

    begun, waited = serving(tmp_path, die)

    async def again(server):
        server.engine.mode = now
        server.engine.release()
        done = [await server.end(await server.get(job_id)) for job_id in (begun, waited)]
        assert [request.mode for request in server.engine.submitted] == [first, None]
        assert [(job.state, job.mode) for job in done] == [("completed", first), ("completed", now)]

    serving(tmp_path, again, StubEngine())


def test_a_job_of_before_there_were_modes_is_read():
    record = msgspec.to_builtins(Job(id="image_1", kind="image", model="m", params={}, created_at=1.0))
    del record["mode"]
    assert msgspec.convert(record, Job).mode is None
