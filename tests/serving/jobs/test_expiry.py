"""When jobs expire: a clock that is wrong removes nothing."""

from __future__ import annotations

import asyncio
import itertools
import subprocess
import sys

import pytest

from safelight.serving.clocks import Clocks, Moment
from safelight.serving.jobs.expiry import GRACE_SECONDS, Expiry
from safelight.serving.jobs.job import Job, JobError
from safelight.serving.jobs.store import Horizon
from tests.serving.job_server import Server, serving, unfinished
from tests.serving.stub_engine import StubEngine

DAY = 24 * 3600.0
YEAR = 365 * DAY


class Hands:
    """Two clocks that tests set."""

    def __init__(self, now=1e9):
        self.now, self.passed = now, 50.0

    def go(self, seconds):
        self.now += seconds
        self.passed += seconds

    @property
    def clocks(self):
        return Clocks(lambda: self.now, lambda: Moment("boot", self.passed))

    def expiry(self, last_end):
        found = Expiry(self.clocks, DAY)
        found.begin(last_end)
        return found


def test_a_clock_that_jumps_expires_nothing_of_an_earlier_boot():
    hands = Hands()
    expiry = hands.expiry(1e9 - 60)
    hands.now += YEAR
    assert expiry.horizon().at == 1e9
    hands.now -= 2 * YEAR
    at = expiry.horizon().at
    assert at is not None and at < 1e9
    hands.now += YEAR
    hands.go(DAY)
    assert expiry.horizon().at == 1e9 + DAY


@pytest.mark.parametrize("last_end", [None, 1e9 - YEAR, 1e9 + YEAR])
def test_a_start_with_another_clock_waits_for_a_day(last_end):
    """What ended before the machine was started is kept; the rest goes by the time that passes."""
    hands = Hands()
    expiry = hands.expiry(last_end)
    hands.go(GRACE_SECONDS - 1)
    assert expiry.horizon() == Horizon(Moment("boot", 50 + GRACE_SECONDS - 1))
    hands.go(1)
    assert expiry.horizon() == Horizon(Moment("boot", 50 + GRACE_SECONDS), 1e9 + GRACE_SECONDS, knows_all=True)


@pytest.mark.parametrize("at_end, at_signing, at_opening", itertools.product((-YEAR, 0.0, YEAR), repeat=3))
def test_addresses_end_with_their_job_and_not_before(at_end, at_signing, at_opening):
    """However the clock was set when the job ended, when its address was signed, and when that is opened."""
    hands = Hands()
    expiry = hands.expiry(1e9 - 60)
    hands.now += at_end
    job = Job(id="image_a", kind="image", model="m", params={}, created_at=1.0)
    job = expiry.ended(job.failed(JobError("cancelled", "c")))
    hands.now += at_signing - at_end
    hands.go(60.0)
    end = expiry.end(job)
    hands.now += at_opening - at_signing
    hands.go(DAY - 120.0)
    assert expiry.now() < end


@pytest.mark.parametrize("years", [-10, 10])
@pytest.mark.parametrize("boots", [("one", "one"), ("one", "two")])
def test_a_server_that_starts_with_a_wrong_clock_keeps_its_jobs(tmp_path, years, boots):
    async def use(server, boot, now):
        server.clock.boot = boot
        server.clock.set(now)
        await server.jobs.start()
        job = await server.end(await server.submit())
        await server.jobs.sweep()
        found = (await server.store.page()).jobs
        await server.jobs.close(1.0)
        return job.id, {each.id for each in found}

    first, _ = asyncio.run(use(Server(tmp_path, StubEngine()), boots[0], 1e9))
    _, found = asyncio.run(use(Server(tmp_path, StubEngine()), boots[1], 1e9 + years * YEAR))
    assert first in found


STAGES = ("before", "queued", "begun", "ended", "asked")


@pytest.mark.parametrize("jump", itertools.pairwise(STAGES))
@pytest.mark.parametrize("years", [-10, 10])
def test_a_clock_that_jumps_between_two_steps_of_a_job(tmp_path, years, jump):
    """It is wrong from one step to the next, or to the end; durations, expiry and order go by what passes."""

    async def use(server):
        clock, right = server.clock, 1e9
        clock.set(right)
        server.jobs.expiry.begin(right)

        def step(name):
            if name in jump:
                clock.set(clock.now + (years * YEAR if name == jump[0] else -years * YEAR))
            clock.now += 1

        older = await server.end(await server.submit())
        step("before")
        job = await server.submit("[hold]")
        step("queued")
        await server.until_step(job, 1)
        step("begun")
        server.engine.release()
        job = await server.end(job)
        step("ended")
        await server.jobs.sweep()
        step("asked")
        assert job.seconds == 2.0 and 0 <= job.queue_seconds <= 1.0
        await server.jobs.sweep()
        assert [each.id for each in await server.store.removable()] == [older.id, job.id]
        assert server.jobs.expiry.end(job) - server.jobs.expiry.now() > DAY - 120
        clock.now += DAY - 10
        await server.jobs.sweep()
        assert {each.id for each in (await server.store.page()).jobs} >= {job.id}
        clock.now += 20
        await server.jobs.sweep()
        assert (await server.store.page()).jobs == []

    serving(tmp_path, use)


def test_how_long_a_job_took_is_not_known_across_a_start_of_the_machine(tmp_path):
    async def begin(server):
        return await server.submit("[hold]")

    async def end(server):
        server.clock.boot = "another"
        server.engine.release()
        (job,) = await unfinished(server.store)
        return await server.end(job)

    serving(tmp_path, begin)
    server_boot = serving(tmp_path, end)
    assert server_boot.state == "completed" and server_boot.seconds is None


def test_the_machines_clock_goes_on_in_another_process():
    script = "from safelight.serving.clocks import Clocks; m = Clocks().moment(); print(m.clock, m.seconds, sep='|')"
    before = Clocks().moment()
    clock, seconds = subprocess.check_output([sys.executable, "-c", script], text=True).strip().split("|")
    found = Moment(clock, float(seconds)).since(before)
    assert found is not None and 0 < found < 60
    assert Moment("x", 2.0).since(Moment("y", 1.0)) is None and Moment("x", 1.0).since(Moment("x", 2.0)) is None
