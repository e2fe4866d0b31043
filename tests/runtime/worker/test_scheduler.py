"""The scheduler under arrivals, failures, deadlines and cancels in any order: each request has one answer, its own."""

from __future__ import annotations

import concurrent.futures
import queue
import threading
from collections import defaultdict
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from safelight.core.executor import SyncExecutor
from safelight.core.request import Req
from safelight.errors import CancelledError, DeadlineError, OutOfMemoryError, RankFailedError, SafelightError
from safelight.runtime.messages import Cancel, Failed, OutputMade, Progressed, Stop, Submit
from safelight.runtime.worker.engine import Engine
from safelight.runtime.worker.policy import Policy
from safelight.runtime.worker.ranks import Ranks
from safelight.runtime.worker.scheduler import PlanExecutor, Scheduler

FAILURES = {
    "": None,
    "[raise@encoding]": SafelightError,
    "[oom@denoising:1]": OutOfMemoryError,
    "[rank1_raise@encoding]": RankFailedError,
    "[rank1_raise@decoding]": RankFailedError,
    "[rank1_oom@denoising:1]": OutOfMemoryError,
}
"""What is in a prompt, and what comes of it; what fails on the second rank fails on no other."""
PATIENCE = 5000
"""Ticks in which everything has ended: more units than any example has."""


@dataclass(frozen=True)
class Asked:
    """One request; `cancelled_at` is the tick before which it is cancelled."""

    prompt: str
    failure: str
    num_inference_steps: int
    seed: int
    n: int
    width: int
    guidance_scale: float
    priority: int
    deadline: float | None
    arrives_at: int
    cancelled_at: int | None

    def fields(self) -> dict[str, object]:
        names = ("num_inference_steps", "seed", "n", "width", "guidance_scale")
        return {"prompt": f"{self.failure} {self.prompt}", **{name: vars(self)[name] for name in names}}


REQUESTS = st.builds(
    Asked,
    prompt=st.sampled_from(["a cat", "an owl at night"]),
    failure=st.sampled_from(["", "", "", *FAILURES]),
    num_inference_steps=st.integers(2, 6),
    seed=st.integers(0, 3),
    n=st.integers(1, 3),
    width=st.sampled_from([16, 64]),
    guidance_scale=st.sampled_from([1.0, 3.0]),
    priority=st.integers(-1, 1),
    deadline=st.sampled_from([None, None, 0.5, 20.0]),
    arrives_at=st.integers(0, 30),
    cancelled_at=st.none() | st.integers(0, 40),
)


class Script:
    """Stands for the socket: gives the scheduler what arrives before each tick, and keeps what it says."""

    engine: Engine

    def __init__(self, schema, asked):
        self.arrivals: dict[int, list[Any]] = defaultdict(list)
        for index, each in enumerate(asked):
            params = schema.params_cls.from_fields(each.fields()).resolve(schema)
            submit = Submit(f"r{index}", params.set_fields(), [], each.priority, each.deadline)
            self.arrivals[each.arrives_at].append(submit)
            if each.cancelled_at is not None and each.cancelled_at >= each.arrives_at:
                self.arrivals[each.cancelled_at].append(Cancel(f"r{index}"))
        self.last_arrival = max(self.arrivals)
        self.said = defaultdict(list)
        self.most_on_device = self.tick = 0

    def receive(self, timeout):
        if self.arrivals[self.tick]:
            return self.arrivals[self.tick].pop(0), []
        self.most_on_device = max(self.most_on_device, sum(task.on_device for task in self.engine.tasks))
        if self.tick > self.last_arrival and not self.engine.tasks:
            return Stop(), []
        self.tick += 1
        assert self.tick < PATIENCE, "somebody waits for ever"
        return None

    def send(self, message, arrays=()):
        self.said[message.request_id].append((message, arrays))


def alone(pipeline, params):
    req = Req("alone", params)
    for _ in SyncExecutor(pipeline).execute(req):
        pass
    return req.outputs[0].numpy()


def check(pipeline, asked, said, exact, num_ranks):
    """One answer, the last thing that is said: every output once, with its bytes, or one error."""
    failure = None if num_ranks == 1 and "rank1" in asked.failure else FAILURES[asked.failure]
    *before, (last, _) = said
    ends = [message for message, _ in said if isinstance(message, Failed)]
    made = {message.output_index: arrays[0] for message, arrays in said if isinstance(message, OutputMade)}
    assert sum(isinstance(message, OutputMade) for message, _ in said) == len(made), "an output came twice"
    if ends:
        assert [last] == ends
        possible = {failure, CancelledError if asked.cancelled_at is not None else None}
        possible.add(DeadlineError if asked.deadline is not None else None)
        assert last.code in {error.code for error in possible if error is not None}
    else:
        assert isinstance(last, OutputMade) and not failure
        assert set(made) == set(range(asked.n))
    assert all(isinstance(message, Progressed | OutputMade) for message, _ in before)
    params = pipeline.schema.params_cls.from_fields(asked.fields()).resolve(pipeline.schema).split()
    for index, picture in made.items():
        expected = alone(pipeline, params[index]).astype(int)
        assert np.abs(picture - expected).max() <= (0 if exact else 1)


LOADS = {
    "asked": st.lists(REQUESTS, min_size=1, max_size=6),
    "max_running": st.integers(1, 3),
    "share": st.floats(0.0, 0.5),
}
TRIED = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)


@pytest.fixture
def clock(fault_family, monkeypatch):
    """Return a clock that goes on when a model sleeps."""
    from safelight_fault.pipeline import FaultPipeline

    now = [0.0]

    def sleep(seconds):
        now[0] += seconds

    monkeypatch.setattr(FaultPipeline, "sleep", staticmethod(sleep))
    return lambda: now[0]


def serve(script, engine):
    """Run a load to its end."""
    script.engine = engine
    channel: Any = script
    scheduler = Scheduler(engine, channel)
    scheduler.run()
    assert not scheduler._inputs.tasks and not engine.tasks
    assert script.most_on_device <= engine.max_running


def check_all(pipeline, asked, script, exact, num_ranks=1):
    assert set(script.said) == {f"r{index}" for index in range(len(asked))}
    for index, each in enumerate(asked):
        check(pipeline, each, script.said[f"r{index}"], exact, num_ranks)


@pytest.mark.parametrize("batching", ["exact", "throughput"])
def test_every_request_has_one_answer_and_its_own(fault_pipeline, clock, batching):
    pipeline = fault_pipeline(step_seconds=1.0)

    @TRIED
    @given(**LOADS)
    def any_load(asked, max_running, share):
        script = Script(pipeline.schema, asked)
        engine = Engine(pipeline, Policy(share), max_running=max_running, batching=batching, clock=clock)
        serve(script, engine)
        check_all(pipeline, asked, script, batching == "exact")

    any_load()


class Between:
    """What joins two ranks that are threads."""

    def __init__(self):
        self.orders: queue.Queue[bytes] = queue.Queue()
        self.meeting = threading.Barrier(2, timeout=30)
        self.votes: list[Any] = [None, None]


class ThreadCommunicator:
    """One rank's way to the other."""

    size = 2

    def __init__(self, rank, between):
        self.rank, self._between = rank, between

    def broadcast_bytes(self, data):
        if self.rank == 0:
            self._between.orders.put(data)
            return data
        return self._between.orders.get(timeout=30)

    def all_gather_list(self, tensor):
        self._between.votes[self.rank] = tensor
        self._between.meeting.wait()
        votes = list(self._between.votes)
        self._between.meeting.wait()
        return votes


class ThisThread(threading.local):
    """Which rank a thread is."""

    rank = 0


class SmallRoom:
    """Room for so many calls at once, on one rank."""

    def __init__(self, most):
        self.most = most

    def fits(self, call, num_stacked):
        return num_stacked <= self.most

    def measured(self, call, make):
        return make(call)


@pytest.mark.parametrize(
    ("batching", "loads"),
    [
        ("exact", 6),
        pytest.param("exact", 30, marks=pytest.mark.slow),
        pytest.param("throughput", 30, marks=pytest.mark.slow),
    ],
)
def test_two_ranks_stay_together_whatever_fails_on_one(fault_pipeline, clock, monkeypatch, batching, loads):
    """The second rank fails alone in some requests, and has less room; the others end on both as they would alone."""
    import safelight_fault.pipeline

    pipelines = [fault_pipeline(step_seconds=1.0, name=name) for name in ("first", "second")]
    here = ThisThread()
    monkeypatch.setattr(safelight_fault.pipeline, "rank", lambda: here.rank)

    @settings(TRIED, max_examples=loads)
    @given(**LOADS, most=st.integers(1, 3))
    def any_load(asked, max_running, share, most):
        between, script = Between(), Script(pipelines[0].schema, asked)
        engines = [
            Engine(
                pipeline,
                Policy(share),
                max_running=max_running,
                batching=batching,
                clock=clock,
                ranks=Ranks(cast(Any, ThreadCommunicator(rank, between)), cast(Any, SmallRoom(most if rank else 9))),
            )
            for rank, pipeline in enumerate(pipelines)
        ]

        def follow():
            here.rank = 1
            try:
                PlanExecutor(engines[1]).run()
            finally:
                between.meeting.abort()  # nobody waits for who is gone

        with concurrent.futures.ThreadPoolExecutor(1) as thread:
            follower = thread.submit(follow)
            serve(script, engines[0])
            follower.result(30)
        assert not engines[1].tasks
        check_all(pipelines[0], asked, script, batching == "exact", 2)

    any_load()
