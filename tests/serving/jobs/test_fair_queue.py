"""Whose job is given to the engine next."""

from __future__ import annotations

import asyncio
import random

import pytest

from safelight.core.tenant import Tenant
from safelight.serving.jobs.fair_queue import FairQueue
from safelight.serving.jobs.job import Job
from safelight.serving.jobs.limits import JobLimits
from safelight.serving.jobs.run import Run
from tests.serving.job_server import serving, unfinished

TENANTS = {name: Tenant(name, share) for name, share in (("a", 0.6), ("b", 0.3), ("c", 0.1), ("none", 0.0))}


def run(owner="", priority=0):
    return Run(Job(id=f"image_{owner}", kind="image", model="m", params={}, owner=owner, priority=priority))


async def taken(runs, limits):
    """Return what the engine is given, one after the other, where nothing ends."""
    submitted: list[Run] = []
    tasks = []
    queue = FairQueue(limits, lambda: submitted)

    async def enter(run):
        with queue.entered(run):
            await asyncio.sleep(0.01)  # until all are there
            await queue.until_first(run)
            submitted.append(run)

    for each in runs:
        tasks.append(asyncio.create_task(enter(each)))
    expected = queue.order(runs)
    await asyncio.wait_for(asyncio.gather(*tasks), 10)
    return submitted, expected


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("tenants", [{}, TENANTS], ids=["nobody", "tenants"])
def test_the_order_is_what_it_says(seed, tenants):
    rng = random.Random(seed)
    runs = [run(rng.choice(list(TENANTS)), rng.choice([0, 0, 0, 3, -3])) for _ in range(60)]
    submitted, expected = asyncio.run(taken(runs, JobLimits(tenants=tenants)))
    assert submitted == expected
    for owner in TENANTS:
        own = [each for each in submitted if each.job.owner == owner]
        assert own == sorted([each for each in runs if each.job.owner == owner], key=lambda each: -each.job.priority)


def test_shares_of_what_is_taken():
    runs = [run(owner) for owner in ("none", "c", "b", "a") for _ in range(100)]
    submitted, _ = asyncio.run(taken(runs, JobLimits(tenants=TENANTS)))
    counts = [sum(each.job.owner == owner for each in submitted[:100]) for owner in ("a", "b", "c", "none")]
    assert counts == pytest.approx([60, 30, 10, 0], abs=2)


def test_without_tenants_higher_priority_goes_first_and_then_what_came_first():
    runs = [run("a"), run("b", 2), run("a", 2), run("c", -1), run("b")]
    submitted, _ = asyncio.run(taken(runs, JobLimits()))
    assert submitted == [runs[1], runs[2], runs[0], runs[4], runs[3]]


def test_a_key_that_comes_to_a_full_engine_is_given_its_places_at_once(tmp_path):
    """And no more: what else it sends waits until others' jobs have ended."""

    async def use(server):
        for n in range(12):
            await server.submit(f"loud {n} [hold]", owner="loud")
        await asyncio.sleep(0.05)
        assert len(server.engine.submitted) == 8
        quiet = [await server.submit(f"quiet {n} [hold]", owner="quiet") for n in range(4)]
        await asyncio.sleep(0.05)
        assert [request.params.prompt.split()[0] for request in server.engine.submitted] == ["loud"] * 8 + ["quiet"] * 2
        tenants = {request.tenant for request in server.engine.submitted}
        assert tenants == set(shares.values())
        assert server.jobs.events.progress(quiet[3].id).queue_position == server.engine.stats.num_waiting + 3
        while await unfinished(server.store):
            server.engine.release()
            await asyncio.sleep(0.01)

    shares = {owner: Tenant(owner, share) for owner, share in (("loud", 0.75), ("quiet", 0.25))}
    serving(tmp_path, use, max_submitted=8, retry_seconds=0.01, tenants=shares)
