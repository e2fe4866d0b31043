"""Jobs through failed requests, deaths of engine and server, full disks, and kill -9 at any moment."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from safelight.core.form import Form
from safelight.errors import StorageFullError
from safelight.preparation import prepare
from safelight.serving.directories import job_of
from safelight.serving.jobs.job import Job, JobError
from tests.serving.disks import as_left_by_a_death, fill, small_disk
from tests.serving.job_server import Server, collect, file_names, serving, unfinished
from tests.serving.stub_engine import IMAGE_SCHEMA, StubEngine, make_media

# Failures.


@pytest.mark.parametrize("code", ["out_of_memory", "non_finite_output", "deadline_exceeded"])
def test_a_failed_request_is_a_failed_job_and_harms_no_other(tmp_path, code):
    async def use(server):
        bad, good = await server.submit(f"[fail:{code}@2]"), await server.submit("good", seed=1)
        events = await collect(server.jobs.events.follow(bad.id))
        assert events[-1].type == "failed"
        job = await server.get(bad.id)
        assert job.error == JobError(code, f"the stub was told to fail: {code}") and job.state == "failed"
        assert job.completed_at is not None and job.expires_at is not None and job.attempts == 1
        assert (await server.end(good)).state == "completed"

    serving(tmp_path, use)


def test_a_mistake_of_ours_fails_the_job_without_its_text(tmp_path, caplog):
    async def use(server):
        bad, good = await server.submit("[garbage]"), await server.submit()
        job = await server.end(bad)
        assert job.error is not None and job.error.code == "internal_error"
        assert "log" in job.error.message and len(job.error.message) < 60
        assert (await server.end(good)).state == "completed"
        assert server.files() == {(await server.get(good.id)).outputs[0].name}

    with caplog.at_level(logging.ERROR):
        serving(tmp_path, use)
    assert [record.exc_info is not None for record in caplog.records] == [True]


def test_one_death_of_the_worker_is_survived_with_the_same_bytes(tmp_path):
    async def use(server):
        dies, lives = [await server.submit(f"same{end}", seed=3) for end in (" [die:1]", "")]
        types = [event.type for event in await collect(server.jobs.events.follow(dies.id))]
        assert types.count("started") == 2 and types[-1] == "completed"
        job = await server.end(dies)
        assert (job.state, job.attempts, job.error) == ("completed", 2, None)
        assert np.array_equal(server.pixels(job), make_media(server.engine.submitted[0].params))
        assert (await server.end(lives)).attempts == 1

    serving(tmp_path, use)


@pytest.mark.parametrize("prompt", ["[die]", "[fail:worker_lost]"], ids=["later", "at once"])
def test_two_deaths_of_the_worker_are_the_end(tmp_path, prompt):
    async def use(server):
        job = await server.end(await server.submit(prompt))
        assert (job.state, job.attempts) == ("failed", 2)
        assert job.error is not None and job.error.code == "worker_lost"
        assert len(server.engine.begun) == 2

    serving(tmp_path, use)


def test_deaths_of_worker_and_server_count_together(tmp_path):
    async def begin(server):
        job = await server.submit("[die:1] [hold]")
        while (await server.get(job.id)).attempts < 2:
            await asyncio.sleep(0.01)
        await server.until_step(job, 3)
        as_left_by_a_death(tmp_path / "state", tmp_path / "left")
        return job.id

    async def look(server):
        job = await server.get(job_id)
        assert (job.state, job.attempts) == ("failed", 2)
        assert job.error is not None and job.error.code == "worker_lost" and job.expires_at is not None
        assert server.engine.submitted == []

    job_id = serving(tmp_path / "state", begin)
    serving(tmp_path / "left", look)


def test_a_dead_servers_jobs_are_run_again_with_the_same_bytes(tmp_path):
    async def begin(server):
        jobs = [await server.submit(f"{n} [hold]", seed=n) for n in range(3)]
        await server.until_step(jobs[0], 3)
        as_left_by_a_death(tmp_path / "state", tmp_path / "left")
        (tmp_path / "left" / "outputs" / ".tmp-0123456789abcdef").write_text("half")
        (tmp_path / "left" / "outputs" / f"{jobs[0].id}.0.png").write_text("published, not completed")
        return [job.id for job in jobs]

    async def go_on(server):
        found = [await server.get(name) for name in ids]
        assert [(job.state, job.attempts) for job in found] == [("in_progress", 1), ("queued", 0), ("queued", 0)]
        assert server.files() == {f"{ids[0]}.0.png"}, "it is the job's own, which will write it again"
        server.engine.release()
        ended = [await server.end(job) for job in found]
        assert [(job.state, job.attempts) for job in ended] == [("completed", 2), ("completed", 1), ("completed", 1)]
        for job, request in zip(ended, server.engine.submitted, strict=True):
            assert job.params["seed"] == request.params.seed
            assert np.array_equal(server.pixels(job), make_media(request.params))

    ids = serving(tmp_path / "state", begin)
    serving(tmp_path / "left", go_on)


# Full disks.


def test_a_full_disk_fails_the_job_and_the_server_lives(tmp_path):
    async def use(server):
        before = await server.end(await server.submit("before", seed=1))
        large = await server.submit("[noise]", height=1024, width=1024, n=3)
        job = await server.end(large)
        assert (job.state, job.attempts) == ("failed", 1)
        assert job.error is not None and job.error.code == "storage_full"
        assert server.files() == {before.outputs[0].name}
        after = await server.end(await server.submit("before", seed=1))
        assert after.state == "completed" and np.array_equal(server.pixels(after), server.pixels(before))

    with small_disk(tmp_path / "disk") as disk:
        serving(disk, use)


def test_a_completion_that_cannot_be_written_down_leaves_no_files(tmp_path, monkeypatch):
    async def use(server):
        replace = server.store.replace

        async def refuse(old, new):
            if new.state == "completed":
                raise StorageFullError("no room")
            return await replace(old, new)

        with monkeypatch.context() as patch:
            patch.setattr(server.store, "replace", refuse)
            job = await server.end(await server.submit())
        assert job.error is not None and job.error.code == "storage_full"
        assert server.files() == set()

    serving(tmp_path, use)


def test_a_disk_so_full_that_nothing_can_be_written_down(tmp_path):
    async def use(server):
        held, doomed = await server.submit("[hold]"), await server.submit("doomed")
        await server.until_step(held, 3)
        filling = fill(tmp_path / "disk")
        with pytest.raises(StorageFullError):
            while True:  # SQLite has some pages to use again
                await server.submit("no room")
        accepted = len(await unfinished(server.store))
        server.engine.release()
        await asyncio.sleep(0.2)
        assert {(await server.get(job.id)).finished for job in (held, doomed)} == {False}
        assert server.files() == await file_names(server.store)
        filling.unlink()
        ended = [await server.end(job) for job in (held, doomed)]
        assert [job.error.code if job.error else job.state for job in ended] == ["storage_full", "storage_full"]
        assert (await server.end(await server.submit("after"))).state == "completed"
        while await unfinished(server.store):
            await asyncio.sleep(0.01)
        assert len((await server.store.page(limit=100)).jobs) == accepted + 1

    with small_disk(tmp_path / "disk") as disk:
        serving(disk, use)


# The form of a job: eager or compiled, when a worker dies and when the server does.


MODES = [("eager", "compiled"), ("compiled", "eager")]


@pytest.mark.parametrize(("first", "now"), MODES)
def test_after_a_workers_death(tmp_path, first, now):
    async def use(server):
        server.engine.mode = first
        job = await server.submit("[die:1] [hold]")
        await server.until_step(job, 1)
        assert (await server.get(job.id)).form == Form(first)
        server.engine.mode = now
        server.engine.release()
        done = await server.end(job)
        assert (done.state, done.attempts, done.form) == ("completed", 2, Form(first))
        assert [request.form for request in server.engine.submitted] == [None, Form(first)]
        later = await server.end(await server.submit("b"))
        assert later.form == Form(now)

    serving(tmp_path, use)


@pytest.mark.parametrize(("first", "now"), MODES)
def test_after_a_restart_of_the_server(tmp_path, first, now):
    """What had begun keeps its form; what had only waited begins in the form of its day."""

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
        assert [request.form for request in server.engine.submitted] == [Form(first), None]
        assert [(job.state, job.form) for job in done] == [("completed", Form(first)), ("completed", Form(now))]

    serving(tmp_path, again, StubEngine())


# kill -9.


def test_no_job_is_lost_or_made_twice_whenever_the_server_dies(tmp_path):
    killed_at_random(tmp_path, rounds=25)


@pytest.mark.slow
def test_no_job_is_lost_or_made_twice_whenever_the_server_dies_often(tmp_path):
    killed_at_random(tmp_path, rounds=300)


def killed_at_random(folder: Path, rounds: int) -> None:
    log, state = folder / "log", folder / "state"
    command = [sys.executable, "-m", "tests.serving.killed_server", str(state), str(log)]
    with subprocess.Popen(command, stdin=-1, stdout=-1, text=True, cwd=Path(__file__).parents[3]) as servers:
        assert servers.stdin is not None and servers.stdout is not None
        for _ in range(rounds):
            servers.stdin.write("start\n")
            servers.stdin.flush()
            child = int(servers.stdout.readline())
            time.sleep(random.random() * 0.25)
            os.kill(child, signal.SIGKILL)
            assert servers.stdout.readline() == "dead\n"
        servers.stdin.close()
    told = [line.split() for line in log.read_text().splitlines()]

    async def finish(server):
        server.engine.state = "restarting"
        await server.jobs.start()
        strays = server.files() - await file_names(server.store)
        ids = {job.id for job in await unfinished(server.store) if job.attempts}
        assert {job_of(name) for name in strays} <= ids, "what belongs to no unfinished job is removed at the start"
        server.engine.state = "ready"
        for job in await unfinished(server.store):
            await server.end(job)
        await check_jobs(server, told)

    began = time.monotonic()
    serving(state, finish, StubEngine(max_running=4), start=False)
    print(f"{rounds} deaths, {len(told)} lines, finished in {time.monotonic() - began:.1f} s")


async def check_jobs(server: Server, told: list[list[str]]) -> None:
    jobs: dict[str, Job] = {}
    after = None
    while True:
        page = await server.store.page(limit=100, order="asc", after=after)
        jobs |= {job.id: job for job in page.jobs}
        if not page.has_more:
            break
        after = page.jobs[-1].id
    deleted = {line[1] for line in told if line[0] == "deleted"}
    deleting = {line[1] for line in told if line[0] == "deleting"}
    accepted = {line[-1] for line in told if line[0] in ("accepted", "keyed")}
    assert accepted and not deleted & set(jobs)
    assert accepted - deleting <= set(jobs), "accepted, and lost"
    completions = Counter(line[1] for line in told if line[0] == "completed")
    assert completions and set(completions.values()) == {1}, "completed twice"
    for _, name, at in (line for line in told if line[0] == "completed"):
        assert name in deleting or jobs[name].completed_at == float(at)
    keys: dict[str, str] = {}
    for key, name in [line[1:] for line in told if line[0] == "keyed" and line[2] not in deleting]:
        assert keys.setdefault(key, name) == name, "one key, two jobs"
    assert {job.state for job in jobs.values()} <= {"completed", "failed"}
    assert {job.attempts for job in jobs.values() if job.state == "completed"} == {1, 2}
    codes = Counter(job.error.code for job in jobs.values() if job.error)
    assert set(codes) <= {"worker_lost", "out_of_memory", "cancelled"}
    assert all(job.attempts == 2 for job in jobs.values() if job.error and job.error.code == "worker_lost")
    assert max(job.attempts for job in jobs.values()) <= 2
    assert server.files() == await file_names(server.store)
    print(f"{len(jobs)} jobs, {len(deleted)} deleted, attempts {Counter(j.attempts for j in jobs.values())}, {codes}")
    for job in list(jobs.values())[-200:]:
        for index, output in enumerate(job.outputs):
            params, _ = prepare(IMAGE_SCHEMA, {**job.params, "seed": output.seed, "n": 1})
            assert np.array_equal(server.pixels(job, index), make_media(params))
