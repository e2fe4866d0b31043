"""Jobs where nothing fails: what they make, how they wait, how they are cancelled, deleted and stopped."""

from __future__ import annotations

import asyncio
import threading
import time

import numpy as np
import pytest
from PIL import Image

from safelight import media, video
from safelight.errors import NotReadyError
from safelight.serving.encoding import encode_image
from safelight.serving.jobs import outputs as outputs_module
from safelight.serving.principals import owner_of
from tests.serving.job_server import SECONDS, Server, collect, file_names, picture, serving
from tests.serving.stub_engine import (
    EDIT_SCHEMA,
    IMAGE_SCHEMA,
    VIDEO_SCHEMA,
    StubEngine,
    make_media,
)

# What a job is when all goes well.


def test_an_image_job_is_completed_with_its_pictures_and_parameters(tmp_path):
    async def use(server):
        job = await server.submit("a fox", n=2, owner=owner_of("key"))
        assert job.state == "queued" and job.id.startswith("image_") and job.params["seed"] is not None
        done = await server.end(job)
        assert (done.state, done.attempts, done.error) == ("completed", 1, None)
        assert (done.created_at, done.started_at, done.completed_at) == (1000.0, 1000.0, 1000.0)
        assert done.expires_at == 1000.0 + 24 * 3600
        assert [output.seed for output in done.outputs] == [job.params["seed"], job.params["seed"] + 1]
        params = server.engine.submitted[0].params
        for index, single in enumerate(params.split()):
            assert np.array_equal(server.pixels(done, index), make_media(single))
        written = media.read_metadata(server.outputs.path(done.outputs[1].name))
        assert written["seed"] == done.outputs[1].seed and written["prompt"] == "a fox"
        assert set(done.timings) == {"denoising", "encoding"}
        assert server.files() == {file.name for file in done.files}

    serving(tmp_path, use)


def test_a_video_job(tmp_path):
    async def use(server):
        job = await server.submit("a fox", seed=5)
        done = await server.end(job)
        assert job.id.startswith("video_") and done.state == "completed" and done.params["fps"] == 8
        (output,) = done.outputs
        assert (output.num_frames, output.fps, set(output.extras)) == (9, 8, {"thumbnail", "spritesheet"})
        assert video.read_metadata(server.outputs.path(output.name))["seed"] == 5

    serving(tmp_path, use, StubEngine(VIDEO_SCHEMA))


def test_formats(tmp_path):
    async def use(server):
        for output_format in ("png", "jpeg", "webp"):
            job = await server.end(await server.submit(output_format=output_format, compression=50))
            with Image.open(server.outputs.path(job.outputs[0].name)) as image:
                assert image.format == output_format.upper()
            assert job.outputs[0].media_type == f"image/{output_format}"
        refused = await server.end(await server.submit("a [alpha]", output_format="jpeg"))
        assert refused.error is not None and (refused.error.code, refused.error.param) == (
            "invalid_value",
            "output_format",
        )

    serving(tmp_path, use)


@pytest.mark.parametrize("schema", [IMAGE_SCHEMA, VIDEO_SCHEMA])
def test_files_are_on_the_disk_before_a_job_is_completed(tmp_path, monkeypatch, schema):
    async def use(server):
        there: list[bool] = []
        replace = server.store.replace

        async def look(old, new):
            if new.state == "completed":
                there.extend(file.name in server.files() for file in new.files)
            return await replace(old, new)

        monkeypatch.setattr(server.store, "replace", look)
        await server.end(await server.submit(n=2))
        assert len(there) == (6 if schema is VIDEO_SCHEMA else 2) and all(there)

    serving(tmp_path, use, StubEngine(schema))


# Waiting, progress, events.


def test_jobs_are_held_back_in_order_while_the_engine_is_full(tmp_path):
    async def use(server):
        jobs = [await server.submit(f"{n} [hold]") for n in range(6)]
        await server.until_step(jobs[0], 3)
        while len(server.engine.submitted) < 3:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)
        assert server.engine.stats.num_waiting == 2, "the engine was not full"
        positions = [server.jobs.events.progress(job.id).queue_position for job in jobs]
        assert positions == [None, 0, 1, 2, 3, 4]
        server.engine.release()
        assert {(await server.end(job)).state for job in jobs} == {"completed"}
        assert [name.partition(".")[0] for name in server.engine.begun] == [job.id for job in jobs]
        assert [(await server.get(job.id)).attempts for job in jobs] == [1] * 6

    serving(tmp_path, use, StubEngine(max_waiting=2))


def test_jobs_leave_room_in_the_engines_queue_for_others(tmp_path):
    async def use(server):
        jobs = [await server.submit("[hold]") for _ in range(6)]
        await server.until_step(jobs[0], 3)
        await asyncio.sleep(0.05)
        assert len(server.engine.submitted) == 3
        server.engine.release()
        assert {(await server.end(job)).state for job in jobs} == {"completed"}

    serving(tmp_path, use, StubEngine(), max_submitted=3)


def test_jobs_wait_for_an_engine_that_is_not_ready(tmp_path):
    async def use(server):
        job = await server.submit()
        server.engine.state = "failed"
        other = await server.submit()
        await asyncio.sleep(0.05)
        assert [(await server.get(j.id)).state for j in (job, other)] == ["queued", "queued"]
        server.engine.state = "ready"
        ended = [await server.end(j) for j in (job, other)]
        assert [(j.state, j.attempts) for j in ended] == [("completed", 1)] * 2

    serving(tmp_path, use, StubEngine(state="restarting"))
    with pytest.raises(NotReadyError):
        asyncio.run(_submit_to_a_loading_engine(tmp_path))


async def _submit_to_a_loading_engine(state):
    server = Server(state, StubEngine(state="loading"))
    try:
        await server.submit()
    finally:
        await server.jobs.close(0.0)


# Cancelling and deleting.


@pytest.mark.parametrize("where", ["held back", "in the engine's queue", "running", "being written", "completed"])
@pytest.mark.parametrize("how", ["cancel", "delete"])
def test_cancelling_and_deleting_anywhere_on_the_way(tmp_path, monkeypatch, where, how):
    encode, encoding = encode_image, threading.Event()

    def slow(*args):
        encoding.set()
        time.sleep(0.1)
        return encode(*args)

    async def use(server):
        if where == "being written":
            monkeypatch.setattr(outputs_module, "encode_image", slow)
        before = [
            await server.submit("[hold]") for _ in range({"held back": 3, "in the engine's queue": 1}.get(where, 0))
        ]
        job = await server.submit("x [hold]" if where == "running" else "x", images={"image": [picture()]})
        if where == "running":
            await server.until_step(job, 3)
        elif where == "being written":
            await asyncio.to_thread(encoding.wait, SECONDS)
        elif where == "completed":
            await server.end(job)
        else:
            await server.until_step(before[0], 3)
            await asyncio.sleep(0.05)
            assert (len(server.engine.submitted) == 2) == (where == "in the engine's queue")
        events = asyncio.create_task(collect(server.jobs.events.follow(job.id)))
        await asyncio.sleep(0.02)
        if how == "cancel":
            ended = await server.jobs.cancel(job.id)
            assert ended == await server.get(job.id) == await server.jobs.cancel(job.id)
            assert ended.state == ("completed" if where == "completed" else "failed")
            assert where == "completed" or (ended.error.code, ended.outputs) == ("cancelled", ())
        else:
            assert await server.jobs.delete(job.id)
            assert await server.store.get(job.id) is None
            assert not await server.jobs.delete(job.id)
        assert (await events)[-1].type == ("completed" if where == "completed" else "failed")
        await asyncio.sleep(0.02)
        assert not any(name.startswith(job.id) for name in server.engine._running), "it works on"
        server.engine.release()
        assert {(await server.end(other)).state for other in before} <= {"completed"}
        while server.jobs.runner.runs:
            await asyncio.sleep(0.01)
        assert server.engine.stats.num_running == 0
        assert server.files() == await file_names(server.store)
        assert any(job.id in name for name in server.files()) == (how == "cancel")  # its input, until it expires
        done = await server.end(await server.submit("control", seed=1))
        assert np.array_equal(server.pixels(done), make_media(server.engine.submitted[-1].params))

    serving(tmp_path, use, StubEngine(EDIT_SCHEMA, max_waiting=2))


def test_a_job_that_begins_while_it_is_cancelled_is_cancelled(tmp_path, monkeypatch):
    async def use(server):
        job = await server.submit()
        replace = server.store.replace

        async def later(old, new):
            if old.state == "queued" and new.state == "failed":
                assert await replace(old, old.begun(1.0))
            return await replace(old, new)

        monkeypatch.setattr(server.store, "replace", later)
        ended = await server.jobs.cancel(job.id)
        assert ended == await server.get(job.id)
        assert (ended.state, ended.attempts, ended.error.code) == ("failed", 1, "cancelled")

    serving(tmp_path, use, StubEngine(state="restarting"))


def test_unknown_jobs_cannot_be_cancelled_or_deleted(tmp_path):
    async def use(server):
        assert await server.jobs.cancel("image_no") is None
        assert not await server.jobs.delete("image_no")

    serving(tmp_path, use)


# Stopping.


def test_a_stop_lets_run_what_runs_and_keeps_what_waits(tmp_path):
    async def use(server):
        jobs = [await server.submit(f"{n}") for n in range(5)]
        await server.until_step(jobs[0], 0)
        return [job.id for job in jobs]

    async def look(server):
        return [(await server.get(name)).state for name in ids]

    async def go_on(server):
        jobs = [await server.end(await server.get(name)) for name in ids]
        assert [(job.state, job.attempts) for job in jobs] == [("completed", 1)] * 5

    ids = serving(tmp_path, use, StubEngine(step_seconds=0.05, max_waiting=2), drain=SECONDS)
    assert serving(tmp_path, look, start=False) == ["completed"] + ["queued"] * 4
    serving(tmp_path, go_on)


def test_a_stop_without_patience_leaves_its_jobs_to_the_next_start(tmp_path):
    async def use(server):
        running = await server.submit("[hold]", seed=1)
        waiting = await server.submit("b")
        await server.until_step(running, 3)
        events = asyncio.create_task(collect(server.jobs.events.follow(waiting.id)))
        return running.id, waiting.id, events

    async def go_on(server):
        server.engine.release()
        jobs = [await server.end(await server.get(name)) for name in ids]
        assert [(job.state, job.attempts) for job in jobs] == [("completed", 2), ("completed", 1)]

    async def refused(server):
        await server.jobs.close(0.0)
        with pytest.raises(NotReadyError):
            await server.submit()

    began = time.monotonic()
    *ids, events = serving(tmp_path, use)
    assert time.monotonic() - began < 5
    assert events.done() and {event.type for event in events.result()} <= {"queued"}
    serving(tmp_path, go_on)
