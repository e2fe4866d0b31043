"""Finished jobs make room for later ones: by age, by quota, and by the size of their records."""

from __future__ import annotations

import asyncio
import dataclasses
import errno

import pytest

from safelight.errors import StorageFullError
from safelight.serving.admission import Admission
from safelight.serving.jobs.inputs import new_job
from safelight.serving.jobs.limits import JobLimits
from tests.serving.job_server import Server, picture, prepared, serving
from tests.serving.stub_engine import EDIT_SCHEMA, StubEngine


def test_finished_jobs_expire(tmp_path):
    async def use(server):
        first = await server.end(await server.submit())
        failed = await server.end(await server.submit("[fail:out_of_memory]"))
        server.clock.now += 50
        second = await server.end(await server.submit())
        waiting = await server.submit("[hold]")
        server.clock.now += 50
        await server.jobs.sweep()
        assert await server.store.get(first.id) is None and await server.store.get(failed.id) is None
        assert server.files() == {second.outputs[0].name}
        server.clock.now += 1000
        while server.files():  # by the periodic task
            await asyncio.sleep(0.01)
        assert await server.store.get(second.id) is None
        assert (await server.get(waiting.id)).state in ("queued", "in_progress")

    serving(tmp_path, use, keep_seconds=100.0, sweep_seconds=0.05)


def test_the_first_finished_make_room_for_later_ones(tmp_path):
    async def use(server):
        first = await server.end(await server.submit("[noise]", seed=1))
        size = first.num_bytes
        server.jobs.retention._limits = dataclasses.replace(server.jobs.retention._limits, max_bytes=int(2.5 * size))
        second, third = [await server.end(await server.submit("[noise]", seed=n)) for n in (2, 3)]
        assert await server.store.get(first.id) is None
        assert server.files() == {second.outputs[0].name, third.outputs[0].name}
        large = await server.end(await server.submit("[noise]", n=3))
        assert large.error is not None and large.error.code == "storage_full"
        assert server.files() == {second.outputs[0].name, third.outputs[0].name}, "nothing is removed in vain"
        with pytest.raises(StorageFullError):
            params, _ = prepared(StubEngine(EDIT_SCHEMA), images={"image": [picture()]})
            await server.jobs.acceptance.submit(
                *new_job(params, EDIT_SCHEMA, {"image": [bytes(3 * size)]}), Admission()
            )
        server.jobs.retention._limits = dataclasses.replace(server.jobs.retention._limits, max_bytes=int(1.5 * size))
        await server.jobs.sweep()
        assert server.files() == {third.outputs[0].name}

    serving(tmp_path, use)


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


@pytest.mark.parametrize("lets_go", [True, False])
def test_a_job_that_was_removed_is_forgotten_once_its_files_are(tmp_path, monkeypatch, lets_go):
    async def use(server):
        def fails(names):
            raise OSError(errno.EIO, "the disk fails")

        job = await server.end(await server.submit())
        with monkeypatch.context() as patch:
            if not lets_go:
                patch.setattr(server.outputs, "_remove", fails)
            assert await server.jobs.delete(job.id)
        assert server.files() == (set() if lets_go else {job.outputs[0].name})
        assert (await server.store.kept([job.id])).keys() == {job.id}
        await server.jobs.sweep()
        assert server.files() == set() and await server.store.kept([job.id]) == {}

    serving(tmp_path, use)
