"""Two servers on one store: no job is run by both at once, whoever pauses or dies, and nothing is made twice."""

from __future__ import annotations

import asyncio
import os
import random
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from safelight.runtime.client import State
from safelight.serving import directories
from safelight.serving.clocks import Clocks
from safelight.serving.directories import MARKER
from safelight.serving.jobs import sqlite
from safelight.serving.jobs.folder import FolderFiles
from safelight.serving.jobs.job import Job
from safelight.serving.jobs.leases import Lease
from safelight.serving.jobs.limits import JobLimits
from safelight.serving.jobs.manager import JobManager
from safelight.serving.jobs.runner import WORKER_LOST
from safelight.serving.jobs.sqlite import SqliteJobStore
from tests.serving.job_server import SECONDS, Clock, submission
from tests.serving.stub_engine import StubEngine, make_media

LEASE = 30.0


class SharedStore(SqliteJobStore):
    """A store that several servers have, and that a paused one does not reach; it counts what it refuses."""

    is_exclusive = False

    def __init__(self, directory: Path, clock: Clock) -> None:
        super().__init__(directory, Clocks(clock, clock.moment))
        self.goes_on = asyncio.Event()
        self.goes_on.set()
        self.completed: list[str] = []
        self.num_refused = 0
        self._thread.submit(self._connection.execute, "PRAGMA synchronous = OFF").result()

    async def _call(self, function, *args):
        await self.goes_on.wait()
        return await super()._call(function, *args)

    async def replace(self, old: Job, new: Job) -> bool:
        done = await super().replace(old, new)
        if done and new.state == "completed":
            self.completed.append(new.id)
        self.num_refused += not done
        return done


class Board:
    """Which engines work on which job now, by their prompts; and when two did."""

    def __init__(self) -> None:
        self.engines: dict[str, set[BoardEngine]] = defaultdict(set)
        self.twice: list[str] = []
        self.steps: Counter[str] = Counter()


class BoardEngine(StubEngine):
    """An engine that stands still while its server is paused, and writes on the board what it works on."""

    def __init__(self, board: Board, step_seconds: float = 0.001, state: State = "ready") -> None:
        super().__init__(step_seconds=step_seconds, state=state)
        self.board = board
        self.goes_on = asyncio.Event()
        self.goes_on.set()

    async def _attempt(self, ticket):
        prompt = str(ticket.request.params.prompt)
        try:
            return await super()._attempt(ticket)
        finally:
            self.board.engines[prompt].discard(self)

    async def _obey(self, prompt, step, steps):
        await self.goes_on.wait()
        at_once = self.board.engines[prompt]
        at_once.add(self)
        self.board.steps[prompt] += 1
        if any(other is not self and other.goes_on.is_set() for other in at_once):
            self.board.twice.append(prompt)
        await super()._obey(prompt, step, steps)


class Node:
    """One server of several over one state directory."""

    def __init__(self, name: str, folder: Path, board: Board, clock: Clock, **engine: Any) -> None:
        self.store, self.engine = SharedStore(folder, clock), BoardEngine(board, **engine)
        self.files = FolderFiles(folder / "outputs")
        limits = JobLimits(retry_seconds=0.005, lease_seconds=LEASE, max_taken=3, max_submitted=4)
        clocks = Clocks(clock, clock.moment)
        self.jobs = JobManager(self.store, self.files, self.engine, limits, clocks, server=name)

    async def submit(self, prompt: str, **fields: Any) -> Job:
        return await self.jobs.acceptance.submit(*submission(self.engine, prompt, **fields))

    async def renew(self) -> None:
        await self.jobs.lease.renew()

    def pause(self) -> None:
        """Stop as a process does that gets SIGSTOP."""
        self.store.goes_on.clear()
        self.engine.goes_on.clear()

    async def go_on(self) -> None:
        """Go on as a process does whose timers have gone off meanwhile."""
        self.store.goes_on.set()
        renewing = asyncio.create_task(self.renew())
        await asyncio.sleep(0)
        self.engine.goes_on.set()
        await renewing

    async def close(self) -> None:
        self.store.goes_on.set()
        self.engine.goes_on.set()
        self.engine.release()
        await self.jobs.close(0.0)
        await self.engine.aclose()


@pytest.fixture(autouse=True)
def unlocked(monkeypatch):
    """Directories that several servers may have."""
    monkeypatch.setattr(directories, "hold", lambda _, folder, name: os.open(folder / name, os.O_RDWR | os.O_CREAT))


def with_nodes(folder: Path, use, **engine: Any):
    async def main():
        clock, board = Clock(), Board()
        nodes = [Node(name, folder, board, clock, **engine) for name in ("a", "b")]
        try:
            async with asyncio.timeout(2 * SECONDS):
                for node in nodes:
                    await node.jobs.start()
                return await use(*nodes, clock, board)
        finally:
            for node in nodes:
                await node.close()

    return asyncio.run(main())


async def until(condition) -> None:
    while not condition():
        await asyncio.sleep(0.001)


async def until_running(node: Node, job: Job, attempts: int = 1) -> None:
    """Wait until a job is recorded as begun."""
    async for event in node.jobs.events.follow(job.id):
        if event.job.state == "in_progress" and event.job.attempts == attempts:
            return


async def ended(node: Node, job: Job) -> Job:
    """Wait for the end of a job, wherever it runs."""
    while True:
        found = await node.store.get(job.id)
        assert found is not None
        if found.finished:
            return found
        await asyncio.sleep(0.002)


def test_a_job_is_claimed_by_whoever_accepts_it_and_by_nobody_else(tmp_path):
    async def use(a, b, clock, board):
        job = await a.submit("x [hold]")
        await until_running(a, job)
        await b.renew()
        clock.now += LEASE / 2
        await a.renew()
        clock.now += LEASE / 2 + 1
        await b.renew()  # half a lease after the last renewal
        await asyncio.sleep(0.02)
        assert b.engine.submitted == []
        a.engine.release()
        done = await ended(b, job)
        assert (done.state, done.attempts, done.lease) == ("completed", 1, None)

    with_nodes(tmp_path, use)


@pytest.mark.parametrize("begun", [True, False])
def test_a_lapsed_lease_is_taken_by_the_other_and_the_first_cannot_write_any_more(tmp_path, begun):
    """What had begun has its second attempt, what had waited its first; the paused server's end is refused."""

    async def use(a, b, clock, board):
        first, waits = await a.submit("x [hold]"), await a.submit("y [hold]")
        job = first if begun else waits
        await until_running(a, first)
        old = await a.store.get(job.id)
        a.pause()
        clock.now += LEASE + 1
        await b.renew()
        b.engine.release()
        done = await ended(b, job)
        assert (done.state, done.attempts) == ("completed", 2 if begun else 1)
        a.store.goes_on.set()
        late = a.jobs.expiry.ended((old if begun else old.begun(1.0)).completed([], [], {}))
        assert not await a.store.replace(old, late)
        assert await a.store.get(job.id) == done
        await a.go_on()
        await until(lambda: not a.jobs.runner.runs)
        for each in (first, waits):
            await ended(b, each)
        assert await a.store.get(job.id) == done and board.twice == []
        assert files(tmp_path) == await names(b)
        again = await a.submit("z")  # it has a lease again
        assert (await ended(b, again)).attempts == 1

    with_nodes(tmp_path, use)


def claimed_anew(state: Path) -> None:
    """A job is claimed by a second server, which has not begun: the form that the first one knows is gone."""

    async def use(a, b, clock, board):
        b.engine.state = "restarting"
        job = await a.submit("x [hold]")
        await until_running(a, job)
        old = await a.store.get(job.id)
        a.pause()
        clock.now += LEASE + 1
        await b.renew()
        await until(lambda: job.id in b.jobs.runner.runs)
        assert (await b.store.get(job.id)).attempts == old.attempts
        a.store.goes_on.set()
        assert not await a.store.replace(old, a.jobs.expiry.ended(old.completed([], [], {})))
        assert not await a.store.replace(old, old.begun(1.0))

    with_nodes(state, use)


def test_the_form_that_a_server_knows_is_gone_with_its_lease(tmp_path):
    claimed_anew(tmp_path)


def test_a_job_dies_with_its_servers_as_often_as_it_may(tmp_path):
    async def use(a, b, clock, board):
        job = await a.submit("x [hold]")
        await until_running(a, job)
        a.pause()
        clock.now += LEASE + 1
        await b.renew()
        await until(lambda: job.id in b.jobs.runner.runs)
        await until_running(b, job, attempts=2)
        b.pause()
        clock.now += LEASE + 1
        await a.go_on()
        done = await ended(a, job)
        assert (done.state, done.attempts) == ("failed", 2) and done.error == WORKER_LOST

    with_nodes(tmp_path, use)


@pytest.mark.parametrize("how", ["completes", "is deleted", "is lost"])
def test_whoever_follows_a_job_is_told_its_end_wherever_it_runs(tmp_path, how):
    """The other server runs it, or takes it from the one that is asked."""

    async def use(a, b, clock, board):
        job = await a.submit("x [hold]")
        await until_running(a, job)
        asked = a if how == "is lost" else b
        followed = asyncio.create_task(collect(asked.jobs.events.follow(job.id)))
        await asyncio.sleep(0.02)
        if how == "is lost":
            clock.now += LEASE + 1
            await b.renew()
            await until_running(b, job, attempts=2)
            await a.renew()
        elif how == "is deleted":
            assert await a.jobs.delete(job.id)
        a.engine.release()
        b.engine.release()
        types = [event.type for event in await followed]
        assert types[0] == "started" and types[-1] == ("failed" if how == "is deleted" else "completed")
        assert types.count("started") == (2 if how == "is lost" else 1)

    with_nodes(tmp_path, use)


@pytest.mark.parametrize("how", ["cancel", "delete"])
def test_what_another_server_ends_is_stopped_at_the_next_renewal(tmp_path, how):
    async def use(a, b, clock, board):
        job, other = await a.submit("x [hold]"), await a.submit("y [hold]")
        await until_running(a, job)
        followed = asyncio.create_task(collect(a.jobs.events.follow(job.id)))
        await asyncio.sleep(0)
        if how == "cancel":
            assert (await b.jobs.cancel(job.id)).error.code == "cancelled"
        else:
            assert await b.jobs.delete(job.id)
        await a.renew()
        assert (await followed)[-1].job.error.code == "cancelled"
        await until(lambda: job.id not in a.jobs.runner.runs)
        a.engine.release()
        assert (await ended(a, other)).state == "completed"
        assert len(a.engine.begun) == 2 and b.engine.begun == []
        assert files(tmp_path) == await names(a)

    with_nodes(tmp_path, use)


def test_a_server_that_stops_gives_its_jobs_away(tmp_path):
    async def use(a, b, clock, board):
        jobs = [await a.submit(f"{n} [hold]") for n in range(3)]
        await until_running(a, jobs[0])
        close, a.close = a.close, nothing
        await close()
        await b.renew()
        b.engine.release()
        assert [(await ended(b, job)).attempts for job in jobs] == [2, 1, 1]

    async def nothing():
        pass

    with_nodes(tmp_path, use)


def test_a_server_that_cannot_renew_stops_by_its_own_clock(tmp_path):
    """It does not wait for a store that it does not reach; one that nobody else has loses no work by that."""

    async def use(a, b, clock, board):
        job = await a.submit("x [hold]")
        await until_running(a, job)
        a.store.goes_on.clear()
        clock.now += LEASE + 1
        renewing = asyncio.create_task(a.renew())
        await until(lambda: not a.engine._running)
        assert not renewing.done()
        a.store.goes_on.set()
        await renewing
        a.engine.release()
        assert (await ended(a, job)).attempts == 2

    async def alone(a, b, clock, board):
        a.store.is_exclusive = True
        job = await a.submit("x [hold]")
        await until_running(a, job)
        clock.now += 10 * LEASE
        await a.renew()
        a.engine.release()
        assert (await ended(a, job)).attempts == 1

    with_nodes(tmp_path / "shared", use)
    with_nodes(tmp_path / "alone", alone)


def test_a_job_that_is_accepted_by_a_lease_that_ended_is_run_once(tmp_path):
    """The server has been paused and does not know yet that another gave up its lease."""

    async def use(a, b, clock, board):
        a.store.is_exclusive = True  # its own clock tells it nothing
        clock.now += LEASE + 1
        await b.renew()
        job = await a.submit("x")
        assert job.lease is None and await a.store.get(job.id) == job and not a.jobs.runner.runs
        await b.renew()
        assert (await ended(b, job)).attempts == 1 and len(b.engine.begun) == 1

    with_nodes(tmp_path, use)


def scenario(state: Path, seed: int, num_jobs: int = 12):
    """Two servers take jobs; one pauses at any moment, once or for good; leases are renewed now and then."""
    chance = random.Random(seed)

    async def use(a, b, clock, board):
        jobs: list[Job] = []
        paused: Node | None = None
        for number in range(num_jobs):
            node = chance.choice([node for node in (a, b) if node is not paused])
            jobs.append(await node.submit(f"{seed}/{number}"))
            await asyncio.sleep(chance.random() * 0.01)
            if paused is None and chance.random() < 0.3:
                paused = chance.choice([a, b])
                paused.pause()
            elif paused is not None and chance.random() < 0.3:
                await paused.go_on()
                paused = None
            clock.now += chance.choice([0.0, LEASE / 4, LEASE / 2])
            for node in (a, b):
                if node is not paused:
                    await node.renew()
        dies = chance.random() < 0.5
        if paused is not None and not dies:
            await paused.go_on()
            paused = None
        done = []
        for job in jobs:
            while not (await (b if paused is a else a).store.get(job.id)).finished:
                clock.now += LEASE / 4
                for node in (a, b):
                    if node is not paused:
                        await node.renew()
                await asyncio.sleep(0.005)
            done.append(await (b if paused is a else a).store.get(job.id))
        if paused is not None:
            await paused.go_on()
        await until(lambda: not a.jobs.runner.runs and not b.jobs.runner.runs)
        return board, [a, b], [await a.store.get(job.id) for job in jobs], done, await names(a)

    return with_nodes(state, use)


def check(state: Path, seeds: range) -> None:
    refused, attempts = 0, Counter[int]()
    for seed in seeds:
        board, nodes, jobs, done, kept = scenario(state / str(seed), seed)
        assert board.twice == [], f"seed {seed}: run twice at once"
        assert jobs == done, f"seed {seed}: changed after its end"
        completed = Counter(job_id for node in nodes for job_id in node.store.completed)
        assert set(completed.values()) <= {1}, f"seed {seed}: completed twice"
        for job in jobs:
            assert job.state == "completed" or (job.attempts, job.error.code) == (2, "worker_lost"), (seed, job)
            attempts[job.attempts] += 1
        assert files(state / str(seed)) == kept, f"seed {seed}"
        refused += sum(node.store.num_refused for node in nodes)
    assert refused and attempts[1] > attempts[2] > 0, "nothing was interrupted"
    print(f"{len(seeds)} seeds: attempts {dict(attempts)}, {refused} late writes refused")


def test_no_job_runs_twice_at_once(tmp_path):
    check(tmp_path, range(6))


@pytest.mark.slow
def test_no_job_runs_twice_at_once_often(tmp_path):
    check(tmp_path, range(100, 220))


def left_over(state: Path, num_jobs: int = 20) -> None:
    """Two servers start at once and find the same jobs, which an earlier one has left."""

    async def leave(a, b, clock, board):
        a.engine.state = "restarting"
        return [await a.submit(f"{number}") for number in range(num_jobs)]

    async def use(a, b, clock, board):
        a.engine.state = b.engine.state = "ready"
        done = [await ended(a, job) for job in left]
        assert [(job.state, job.attempts) for job in done] == [("completed", 1)] * num_jobs
        assert board.twice == [] and set(board.steps.values()) == {4}, "run twice"
        assert a.engine.begun and b.engine.begun, "one of them did it all"

    left = with_nodes(state, leave)
    with_nodes(state, use, step_seconds=0.002, state="restarting")


def test_two_servers_that_start_at_once_divide_what_is_left_over(tmp_path):
    left_over(tmp_path)


def resumed(state: Path) -> None:
    """A server goes on in the midst of a job that another has begun meanwhile, before it has heard of that."""

    async def use(a, b, clock, board):
        job = await a.submit("x", num_inference_steps=400)
        await until_running(a, job)
        a.pause()
        clock.now += LEASE + 1
        await b.renew()
        await until(lambda: job.id in b.jobs.runner.runs)
        await until_running(b, job, attempts=2)
        await a.go_on()
        assert (await ended(b, job)).attempts == 2
        assert board.twice == []

    with_nodes(state, use)


def test_a_server_that_goes_on_stops_what_it_may_have_lost_before_it_asks(tmp_path):
    resumed(tmp_path)


def late(state: Path, what: str = "claim") -> None:
    """A server is told that it has a job after it has lost it, and has another lease: the job is another's."""

    async def use(a, b, clock, board):
        told, asked, call = asyncio.Event(), asyncio.Event(), getattr(a.store, what)

        async def late_call(*args):
            answer = await call(*args)
            asked.set()
            await told.wait()
            return answer

        setattr(a.store, what, late_call)
        if what == "claim":  # of a job that another server has accepted and given away
            b.engine.state = "restarting"
            job = await b.submit("x [hold]")
            await b.jobs.lease.end()
            await a.renew()
            await asyncio.wait_for(asked.wait(), SECONDS)
        else:
            accepting = asyncio.create_task(a.submit("x [hold]"))
            await asyncio.wait_for(asked.wait(), SECONDS)
            (job,) = (await b.store.page()).jobs
        clock.now += LEASE + 1
        b.engine.state = "ready"
        await b.renew()
        await until_running(b, job)
        await a.renew()
        told.set()
        if what == "add":
            assert (await accepting).id == job.id
        await asyncio.sleep(0.1)
        assert board.twice == [] and a.engine.begun == [] and not a.jobs.runner.runs
        b.engine.release()
        assert (await ended(a, job)).attempts == 1

    with_nodes(state, use)


@pytest.mark.parametrize("what", ["claim", "add"])
def test_what_is_told_late_is_not_run(tmp_path, what):
    late(tmp_path, what)


def read_meanwhile(state: Path) -> None:
    """A server is paused while it reads what a job is to be run with, and loses the job meanwhile."""

    async def use(a, b, clock, board):
        read, asked, run = asyncio.Event(), asyncio.Event(), a.files.run

        async def late_run(*args):
            result = await run(*args)
            asked.set()
            await read.wait()
            return result

        a.files.run = late_run
        job = await a.submit("x [hold]")
        await asyncio.wait_for(asked.wait(), SECONDS)
        clock.now += LEASE + 1
        await b.renew()
        await until_running(b, job)
        read.set()  # before its timers go off
        await asyncio.sleep(0.1)
        assert board.twice == [] and a.engine.begun == []
        b.engine.release()
        assert (await ended(b, job)).attempts == 1
        await a.renew()
        await until(lambda: not a.jobs.runner.runs)

    with_nodes(state, use)


def test_a_lease_that_ends_while_a_job_is_read_runs_nothing(tmp_path):
    read_meanwhile(tmp_path)


BROKEN = {
    "claims": (sqlite, "_CLAIM", sqlite._CLAIM.replace("DO NOTHING", "DO UPDATE SET lease = :lease"), left_over),
    "fence": (sqlite, "_UPDATE", sqlite._UPDATE.partition(" AND (SELECT lease")[0], claimed_anew),
    "trust": (Lease, "has_lapsed", False, resumed),
    "lapses": (Lease, "has_lapsed", False, read_meanwhile),
    "covers": (Lease, "covers", lambda self, job: True, read_meanwhile),
}


@pytest.mark.parametrize(("where", "what", "broken", "use"), BROKEN.values(), ids=BROKEN)
def test_these_tests_see_what_is_broken(tmp_path, monkeypatch, where, what, broken, use):
    """Claims that take what is held, writes without a fence, and a server that trusts its lease."""
    monkeypatch.setattr(where, what, broken)
    with pytest.raises(AssertionError):
        use(tmp_path)


def files(state: Path) -> set[str]:
    return {path.name for path in (state / "outputs").iterdir()} - {MARKER}


async def names(node: Node) -> set[str]:
    page = await node.store.page(limit=100)
    assert not page.has_more
    return {file.name for job in page.jobs for file in job.files}


async def collect(events):
    return [event async for event in events]


def test_the_second_attempt_has_the_same_pictures(tmp_path):
    async def use(a, b, clock, board):
        job = await a.submit("x [hold]")
        await until_running(a, job)
        a.pause()
        clock.now += LEASE + 1
        b.engine.release()
        await b.renew()
        done = await ended(b, job)
        await a.go_on()
        path = b.files.path(done.outputs[0].name)
        assert path.name == f"{job.id}.attempt2.0.png" and path.stat().st_size == done.outputs[0].num_bytes
        with b.files.open(path.name) as file:
            assert np.array_equal(np.asarray(Image.open(file)), make_media(b.engine.submitted[-1].params))

    with_nodes(tmp_path, use)
