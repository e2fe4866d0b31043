"""Each tenant of an engine has its share of the device's time, whatever the others send."""

from __future__ import annotations

import random

import pytest

from safelight.core.tenant import NOBODY, Tenant
from safelight.runtime.worker.engine import Engine
from safelight.runtime.worker.policy import Policy
from tests.runtime.conftest import request

WINDOW = 100.0


class Load:
    """Tenants that always have something to do, and what each of them was given."""

    def __init__(self, pipeline, clock, batching="latency", **settings):
        self.pipeline, self.clock = pipeline, clock
        policy = Policy(share=0.0, window=WINDOW)
        self.engine = Engine(pipeline, clock=clock, policy=policy, batching=batching, **settings)
        self.seconds, self.tasks = {}, {}

    def keep(self, tenant, number, steps, **asked):
        """See that a tenant has so many requests."""
        tasks = [task for task in self.tasks.get(tenant, ()) if not task.done]
        while len(tasks) < number:
            name = f"{tenant.name}{len(self.engine.tasks)}-{self.clock()}-{len(tasks)}"
            req = request(self.pipeline, request_id=name, num_inference_steps=steps)
            tasks.append(self.engine.add(req, tenant=tenant, **asked))
        self.tasks[tenant] = tasks

    def tick(self):
        began = self.clock()
        for task in (touched := self.engine.tick()):
            given = self.seconds.get(task.tenant, 0.0)
            self.seconds[task.tenant] = given + (self.clock() - began) / len(touched)

    def shares(self):
        total = sum(self.seconds.values())
        return {tenant.name: seconds / total for tenant, seconds in self.seconds.items()}


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
@pytest.mark.parametrize("batching", ["latency", "throughput"])
def test_a_flood_of_short_and_urgent_requests_leaves_a_tenant_its_share(fault_pipeline, clock, share, batching):
    load = Load(fault_pipeline(step_seconds=1.0), clock, batching, max_running=4)
    quiet, loud = Tenant("quiet", share), Tenant("loud", 1 - share)
    for _ in range(400):
        load.keep(loud, 20, 2, priority=5, deadline=1000.0)
        load.keep(quiet, 1, 30)
        load.tick()
    assert load.shares()["quiet"] == pytest.approx(share, abs=0.05)


def test_without_shares_the_flood_has_it_all(fault_pipeline, clock):
    """So that the test above says something."""
    load = Load(fault_pipeline(step_seconds=1.0), clock, max_running=4)
    for _ in range(400):
        load.keep(Tenant("loud"), 20, 2, priority=5)
        load.keep(Tenant("quiet"), 1, 30)
        load.tick()
    assert load.shares().get("quiet", 0.0) == 0.0


@pytest.mark.parametrize("seed", range(6))
def test_whoever_is_busy_has_its_share(fault_pipeline, clock, seed):
    """Of random tenants with random work, whose shares are not more than all."""
    rng = random.Random(seed)
    weights = [rng.random() for _ in range(rng.randint(2, 5))]
    tenants = [Tenant(f"t{index}", 0.9 * weight / sum(weights)) for index, weight in enumerate(weights)]
    load = Load(fault_pipeline(step_seconds=1.0), clock, max_running=rng.choice([1, 3, 8]))
    work = {tenant: (rng.randint(1, 6), rng.randint(2, 20), rng.randint(-5, 5)) for tenant in tenants}
    for _ in range(600):
        for tenant, (number, steps, priority) in work.items():
            load.keep(tenant, number, steps, priority=priority)
        load.keep(NOBODY, 3, 2, priority=10)
        load.tick()
    for tenant in tenants:
        assert load.shares()[tenant.name] >= tenant.share - 0.03, (tenant, work[tenant], load.shares())


def test_nothing_is_saved_up_while_there_is_nothing_to_do(fault_pipeline, clock):
    load = Load(fault_pipeline(step_seconds=1.0), clock, max_running=4)
    late, busy = Tenant("late", 0.5), Tenant("busy", 0.5)
    for _ in range(200):
        load.keep(busy, 2, 10)
        load.tick()
    before, began = load.seconds[busy], clock()
    for _ in range(40):
        load.keep(busy, 2, 10)
        load.keep(late, 2, 10)
        load.tick()
    assert load.seconds[busy] - before >= 0.4 * (clock() - began)
