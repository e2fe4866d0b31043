"""The engine resumes requests a unit at a time: each gets the bytes that it gives alone, and fails alone."""

from __future__ import annotations

import math

import pytest
import torch

from safelight.core.executor import SyncExecutor
from safelight.errors import CancelledError, DeadlineError, NonFiniteOutputError
from safelight.runtime.worker.engine import Engine
from safelight.runtime.worker.plan import Plan
from safelight.runtime.worker.policy import Policy
from tests.runtime.conftest import request
from tests.runtime.engines import Clock, drive


def alone(pipeline, req):
    for _ in SyncExecutor(pipeline).execute(req):
        pass
    return req.outputs[0]


@pytest.mark.parametrize("units", range(1, 9))
@pytest.mark.parametrize("batching", ["exact", "throughput"])
def test_a_cancelled_request_does_not_one_unit_more(fault_pipeline, monkeypatch, batching, units):
    """Wherever it is: before its encoding, in its loop of two steps, or in one of the five units of its decoding."""
    pipeline = fault_pipeline("FaultVideoPipeline", step_seconds=1.0, decode_seconds=2.0)
    slept: list[float] = []
    monkeypatch.setattr(type(pipeline).__mro__[1], "sleep", staticmethod(slept.append))
    engine = Engine(pipeline, batching=batching)
    task = engine.add(request(pipeline, num_inference_steps=2, num_frames=17))
    while len(slept) < units and not task.done:
        engine.tick()
    before = list(slept)
    assert len(before) == min(units, 7) and before == [5.0, 5.0, 2.0, 2.0, 2.0, 2.0, 2.0][: len(before)]
    engine.cancel("r0")
    assert not engine.tick() and slept == before
    assert task.done and task.execution.req.pending == []


PROMPTS = [("a cat", 4), ("a large dog", 7), ("an owl at night", 2), ("x", 9), ("a cat", 4), ("two", 5)]


@pytest.mark.parametrize("max_running", [1, 2, 8])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_many_requests_give_the_bytes_of_each_alone(fault_pipeline, max_running, guidance):
    pipeline = fault_pipeline()
    asked = [
        {
            "prompt": prompt,
            "num_inference_steps": steps,
            "guidance_scale": guidance,
            "seed": index,
            "width": 8 * index + 16,
        }
        for index, (prompt, steps) in enumerate(PROMPTS)
    ]
    expected = [alone(pipeline, request(pipeline, **fields)) for fields in asked]
    engine = Engine(pipeline, max_running=max_running)
    tasks = []
    for index, fields in enumerate(asked):
        tasks.append(engine.add(request(pipeline, request_id=f"r{index}", **fields)))
        for _ in range(3):
            engine.tick()
            assert sum(task.on_device for task in engine.tasks) <= max_running
    drive(engine)
    for task, output in zip(tasks, expected, strict=True):
        assert task.done and task.error is None
        assert torch.equal(task.execution.req.outputs[0], output)


def test_stacked_requests_are_as_near_as_stacking_allows(fault_pipeline, monkeypatch):
    pipeline = fault_pipeline()
    sizes = []
    layer = pipeline.get_module("transformer").layer
    layer.register_forward_hook(lambda module, args, output: sizes.append(len(output)))
    asked = [
        {"prompt": prompt, "num_inference_steps": steps, "seed": index, "guidance_scale": 1.0 + index % 2}
        for index, (prompt, steps) in enumerate(PROMPTS)
    ]
    reqs = [request(pipeline, **fields) for fields in asked]
    for req in reqs:
        alone(pipeline, req)
    num_alone = len(sizes)
    sizes.clear()
    engine = Engine(pipeline, max_running=8, batching="throughput", clock=Clock())
    tasks = [engine.add(request(pipeline, request_id=f"r{index}", **fields)) for index, fields in enumerate(asked)]
    drive(engine)
    assert sum(sizes) == num_alone
    assert max(sizes) == 9, "the rows of six requests, three of them with two branches"
    assert len(sizes) == 9, "as many forwards as the longest has steps"
    for task, req in zip(tasks, reqs, strict=True):
        difference = task.execution.req.outputs[0].int() - req.outputs[0].int()
        assert difference.abs().max() <= 1


def test_outputs_of_one_request_are_told_apart(fault_pipeline):
    """Their calls have the same key."""
    pipeline = fault_pipeline()
    expected = [alone(pipeline, request(pipeline, seed=seed)) for seed in (1, 2)]
    engine = Engine(pipeline, batching="throughput", clock=Clock())
    tasks = [engine.add(request(pipeline, seed=seed)) for seed in (1, 2)]
    drive(engine)
    for task, picture in zip(tasks, expected, strict=True):
        assert (task.execution.req.outputs[0].int() - picture.int()).abs().max() <= 1


def test_only_equal_signatures_are_stacked(fault_pipeline):
    pipeline = fault_pipeline()
    shapes = []
    layer = pipeline.get_module("transformer").layer
    layer.register_forward_hook(lambda module, args, output: shapes.append(tuple(output.shape)))
    engine = Engine(pipeline, max_running=8, batching="throughput", clock=Clock())
    for index, width in enumerate((64, 32, 64)):
        engine.add(request(pipeline, request_id=f"r{index}", width=width, num_inference_steps=2))
    drive(engine)
    assert sorted(shapes) == [(1, 32, 4)] * 2 + [(2, 64, 4)] * 2


@pytest.mark.parametrize("batching", ["exact", "throughput"])
@pytest.mark.parametrize("what", ["raise", "oom", "nan"])
@pytest.mark.parametrize("where", ["encoding", "denoising:2", "decoding"])
def test_a_failure_ends_its_request_alone(fault_pipeline, batching, what, where):
    if (what, where) == ("nan", "encoding"):
        where = "denoising"  # there are no latents to spoil before
    pipeline = fault_pipeline()
    control = alone(pipeline, request(pipeline, "a control"))
    engine = Engine(pipeline, batching=batching)
    bad = engine.add(request(pipeline, f"[{what}@{where}] a cat", "bad"))
    good = engine.add(request(pipeline, "a control", "good"))
    drive(engine)
    assert bad.error is not None and good.error is None
    assert isinstance(bad.error, NonFiniteOutputError) == (what == "nan")
    assert torch.equal(good.execution.req.outputs[0], control)


def test_a_failing_forward_of_several_fails_only_the_one_at_fault(fault_pipeline, monkeypatch):
    pipeline = fault_pipeline()
    transformer = pipeline.get_module("transformer")
    real = transformer.forward

    def forward(hidden_states):
        if len(hidden_states) > 2:
            raise torch.OutOfMemoryError("too many rows")
        return real(hidden_states)

    monkeypatch.setattr(transformer, "forward", forward)
    engine = Engine(pipeline, batching="throughput")
    tasks = [
        engine.add(request(pipeline, request_id=f"r{index}", guidance_scale=g)) for index, g in enumerate((1, 2, 1))
    ]
    drive(engine)
    assert [task.error for task in tasks] == [None] * 3


def test_cancel_ends_all_outputs_of_a_request_at_once(fault_pipeline):
    engine = Engine(fault_pipeline())
    first, second = (engine.add(request(engine.pipeline, request_id="r0", seed=seed)) for seed in (1, 2))
    other = engine.add(request(engine.pipeline, request_id="r1"))
    for _ in range(3):
        engine.tick()
    assert set(engine.cancel("r0")) == {first, second}
    assert engine.tasks == [other]
    assert isinstance(first.error, CancelledError) and first.execution.req.pending == []
    assert engine.cancel("r0") == []
    drive(engine)
    assert other.error is None


def test_a_request_past_its_deadline_never_begins(fault_pipeline):
    clock = Clock()
    engine = Engine(fault_pipeline(), max_running=1, clock=clock)
    busy = engine.add(request(engine.pipeline, request_id="busy"))
    engine.tick()
    late = engine.add(request(engine.pipeline, request_id="late"), deadline=1.0)
    in_time = engine.add(request(engine.pipeline, request_id="in time"), deadline=3.0)
    clock.now += 2
    assert engine.tick()[0] is late
    drive(engine)
    assert isinstance(late.error, DeadlineError) and not late.execution.started
    assert busy.error is None and in_time.error is None


@pytest.fixture
def clock(monkeypatch, fault_family):
    from safelight_fault.pipeline import FaultPipeline

    clock = Clock()
    monkeypatch.setattr(FaultPipeline, "sleep", staticmethod(clock.sleep))
    return clock


def finish_order(engine, tasks):
    order = []
    while engine.tasks:
        for task in engine.tick():
            if task.done:
                order.append(tasks.index(task))
    return order


def test_priority_then_deadline_then_least_work(fault_pipeline, clock):
    engine = Engine(fault_pipeline(step_seconds=1.0), max_running=1, clock=clock)
    engine.add(request(engine.pipeline, request_id="first", num_inference_steps=1))
    while engine.tasks:  # a step's time is known from here on
        engine.tick()
    add = lambda **details: engine.add(  # noqa: E731
        request(engine.pipeline, request_id=f"r{len(engine.tasks)}", num_inference_steps=details.pop("steps")),
        **details,
    )
    tasks = [
        add(steps=9),
        add(steps=2),
        add(steps=5, priority=1),
        add(steps=8, deadline=1000),
        add(steps=9, deadline=400),
    ]
    assert finish_order(engine, tasks) == [2, 4, 3, 1, 0]


def test_a_short_request_pre_empts_a_long_one(fault_pipeline, clock):
    engine = Engine(fault_pipeline(step_seconds=1.0), max_running=1, clock=clock)
    long = engine.add(request(engine.pipeline, request_id="long", num_inference_steps=50))
    expected = alone(engine.pipeline, request(engine.pipeline, num_inference_steps=50))
    while long.execution.req.step_index < 10:
        engine.tick()
    short = engine.add(request(engine.pipeline, request_id="short", num_inference_steps=2))
    while not short.done:
        engine.tick()
        assert long.on_device != short.on_device or short.done
    assert long.execution.req.step_index == 10
    drive(engine)
    assert torch.equal(long.execution.req.outputs[0], expected)


@pytest.mark.parametrize("share", [0.1, 0.3])
@pytest.mark.parametrize("priority", [0, 5])
def test_the_oldest_gets_its_share_against_any_number_of_others(fault_pipeline, clock, share, priority):
    """Short requests without end, of higher priority too: the long one still gets its share, and no more."""
    engine = Engine(fault_pipeline(step_seconds=1.0), Policy(share=share, window=200), max_running=2, clock=clock)
    long = engine.add(request(engine.pipeline, request_id="long", num_inference_steps=1000))
    steps_at = {}
    for index in range(300):
        engine.add(
            request(engine.pipeline, request_id=f"s{index}", num_inference_steps=4),
            priority=priority,
            deadline=math.inf,
        )
        while len(engine.tasks) > 2:
            engine.tick()
            steps_at[round(clock.now)] = long.execution.req.step_index
    for start in range(200, 900, 50):
        got = steps_at[start + 200] - steps_at[start]
        assert share * 200 - 2 <= got <= share * 200 + 2


def test_what_is_resident_goes_before_its_equals(fault_pipeline, monkeypatch):
    engine = Engine(fault_pipeline(), max_running=4, clock=Clock())
    tasks = [engine.add(request(engine.pipeline, request_id=f"r{index}")) for index in range(2)]
    while not all(task.calls for task in tasks):
        engine.carry_out(Plan([next(task for task in tasks if not task.calls)]))
    assert engine.policy.order(tasks, engine.clock())[0] is tasks[0]
    object.__setattr__(tasks[0].calls[0], "component", "elsewhere")
    monkeypatch.setattr(engine.pipeline.residency, "is_resident", lambda name: name != "elsewhere")
    assert engine.policy.order(tasks, engine.clock())[0] is tasks[1]


@pytest.mark.parametrize("decoded_before", [0, 1])
def test_a_long_decoding_stalls_nobody_for_longer_than_a_unit(fault_pipeline, clock, decoded_before):
    """Neither the first of its kind, nor one whose length is known."""
    pipeline = fault_pipeline("FaultVideoPipeline", step_seconds=1.0, decode_seconds=5.0)
    engine = Engine(pipeline, max_running=2, clock=clock)

    def add(name, num_frames, num_steps):
        return engine.add(request(pipeline, request_id=name, num_frames=num_frames, num_inference_steps=num_steps))

    short = add("short", 1, 6)
    drive(engine)
    for index in range(decoded_before):
        add(f"known {index}", 41, 2)
        drive(engine)
    long = add("long", 41, 2)
    while not long.tail_seconds >= 10:
        engine.tick()
    begun = clock.now
    short = add("short again", 1, 6)
    while not short.done:
        engine.tick()
    alone, unit = 6 * 1.0 + 5.0, 5.0
    assert clock.now - begun <= alone + 2 * unit
    assert not long.done
    drive(engine)
    assert long.error is None
