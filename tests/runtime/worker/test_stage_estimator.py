"""A unit that does not fit is refused before it begins, whatever stage it is of; what fits is taken."""

from __future__ import annotations

import re

import numpy as np
import pytest

from safelight.core.stage_memory import StageMemory
from safelight.errors import InvalidParameterError, OutOfMemoryError
from safelight.runtime.messages import Submit, split_images
from safelight.runtime.worker import stage_estimator
from safelight.runtime.worker.engine import Engine
from safelight.runtime.worker.memory_gauge import Gauge
from safelight.runtime.worker.plan import Plan
from safelight.runtime.worker.ranks import Ranks
from safelight.runtime.worker.scheduler import InputProcessor
from safelight.runtime.worker.stage_estimator import LEAST, SHARES, StageEstimator, held_by
from tests.calls import loaded_as
from tests.runtime.conftest import request
from tests.runtime.engines import drive as run

STAGES = ("encoding", "denoising", "decoding")
GIB = 1 << 30
A_TOKEN = GIB // 64
"""A request of 64 tokens, 64x64 pixels, takes a gibibyte."""


class FakeGauge(Gauge):
    """Where as much is left as a test says."""

    def __init__(self, left=2**60, ceiling=2**60):
        self.left, self.most, self.took = left, ceiling, GIB

    def free(self):
        return self.left

    def ceiling(self):
        return self.most

    def begin(self):
        return 500

    def peak(self):
        return 500 + self.took


@pytest.fixture
def counted(fault_pipeline):
    """Return a function: an engine and its gauge, where one stage takes a gibibyte for 64 tokens."""

    def make(stage, a_token=A_TOKEN, **more):
        counted = (StageMemory(stage, 0, 0, a_token),)
        pipeline = loaded_as(fault_pipeline(name="counted"), count_memory=lambda: counted)
        gauge = FakeGauge(**more)
        estimator = StageEstimator(pipeline, gauge)
        estimator.count()
        return Engine(pipeline, ranks=Ranks(stage_estimator=estimator), max_running=4), gauge

    return make


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("num_others", [0, 2])
def test_a_stage_that_does_not_fit_ends_that_request_alone(counted, expected, stage, num_others):
    engine, _ = counted(stage, left=GIB)
    bad = engine.add(request(engine.pipeline, height=128, width=64))
    others = [engine.add(request(engine.pipeline, request_id=f"other{index}")) for index in range(num_others)]
    run(engine)
    assert isinstance(bad.error, OutOfMemoryError)
    assert re.fullmatch(rf"{stage} needs about 2.0[01] GiB of memory .* and 1.00 GiB are free; .*", str(bad.error))
    assert not bad.execution.req.outputs
    assert bad.execution.req.step_index == (4 if stage == "decoding" else 0), "it came as far as it could"
    for other in others:
        assert other.error is None
        assert np.array_equal(other.execution.req.outputs[0].numpy(), expected())


@pytest.mark.parametrize("stage", STAGES)
def test_what_fits_to_the_byte_is_taken(counted, stage):
    engine, gauge = counted(stage, left=GIB)
    task = engine.add(request(engine.pipeline))
    run(engine)
    assert task.error is None
    gauge.left = GIB - (1 << 20)
    task = engine.add(request(engine.pipeline))
    run(engine)
    assert isinstance(task.error, OutOfMemoryError)


def test_what_others_hold_is_not_there(counted):
    """Three are in turn between two steps, and each holds a kibibyte: there is room for what two hold."""
    engine, gauge = counted("denoising")
    tasks = [engine.add(request(engine.pipeline, request_id=f"r{index}")) for index in range(3)]

    def free():
        return capacity - sum(held_by(task.execution.req, engine.pipeline.device) for task in engine.tasks)

    gauge.free, capacity = free, 2 * GIB
    for task in tasks:
        while not task.calls:
            engine.carry_out(Plan([task]))
    held = [held_by(task.execution.req, engine.pipeline.device) for task in tasks]
    assert min(held) >= 1024 and max(held) == min(held)
    capacity = GIB + 5 * held[0] // 2
    for task in tasks:
        engine.carry_out(Plan([task]))
    assert [task.error is not None for task in tasks] == [True, False, False]
    run(engine)
    assert [task.error is not None for task in tasks] == [True, False, False]


@pytest.mark.parametrize("took", [0.5, 1.0, 1.5, 4.0])
def test_what_was_measured_corrects_what_was_counted(counted, took):
    engine, gauge = counted("denoising")
    gauge.took = int(took * GIB)
    task = engine.add(request(engine.pipeline))
    run(engine)
    share = min(max(took, SHARES[0]), SHARES[1])
    needed = engine.ranks._stages.needed(task.execution.req)
    assert needed == 0  # its stage is over: nothing is known of decoding
    task.execution.req.stage = "denoising"
    assert engine.ranks._stages.needed(task.execution.req) == pytest.approx(share * GIB, rel=1e-3)


@pytest.mark.parametrize(("num_bytes", "learns"), [(LEAST - 64, False), (LEAST, True)])
def test_large_units_alone_are_measured(counted, num_bytes, learns):
    """What small ones take is lost in what the libraries take now and then; looking would cost more than they."""
    engine, gauge = counted("denoising", num_bytes / 64)
    gauge.took = 2 * num_bytes
    task = engine.add(request(engine.pipeline))
    run(engine)
    task.execution.req.stage = "denoising"
    assert engine.ranks._stages.needed(task.execution.req) == (2 * num_bytes if learns else num_bytes)


def test_what_can_never_fit_is_told_by_its_size(counted):
    engine, _ = counted("decoding", ceiling=4 * GIB)
    fits, never = (request(engine.pipeline, height=height, width=64).params for height in (256, 264))
    assert engine.ranks.refusal(fits) is None
    refusal = engine.ranks.refusal(never)
    assert isinstance(refusal, InvalidParameterError) and refusal.param == "size"
    assert "decoding needs about 4.13 GiB of memory, and the model leaves 4.00 GiB" in str(refusal)


def test_what_can_never_fit_is_no_task(counted):
    engine, _ = counted("decoding", ceiling=4 * GIB)
    for height, tasks in ((264, 0), (256, 1)):
        params = request(engine.pipeline, height=height, width=64).params
        ended = InputProcessor(engine).process(Submit("r0", split_images(params)[0], []), [])
        assert (ended is None) == bool(tasks) and len(engine.tasks) == tasks


def counting(calls):
    """Return a counting of nothing that is counted itself."""

    def count():
        calls.append(1)
        return ()

    return count


@pytest.mark.parametrize(("height", "counts"), [(64, 0), (4096, 1)])
def test_a_model_is_counted_for_the_first_request_that_may_matter(fault_pipeline, height, counts):
    calls: list[int] = []
    pipeline = loaded_as(fault_pipeline(), count_memory=counting(calls))
    estimator = StageEstimator(pipeline, FakeGauge(left=4 * GIB))
    for _ in range(2):
        estimator.refusal(request(pipeline, height=height, width=64).params)
    assert len(calls) == counts


def test_a_large_model_is_counted_when_it_is_loaded(fault_pipeline, monkeypatch):
    calls: list[int] = []
    pipeline = loaded_as(fault_pipeline(), count_memory=counting(calls))
    monkeypatch.setattr(stage_estimator, "WORTH", 80)  # bytes of its one layer
    StageEstimator(pipeline, FakeGauge())
    assert calls


def test_a_model_that_cannot_be_counted_refuses_nothing(fault_pipeline):
    def fail():
        raise ValueError("not without weights")

    pipeline = loaded_as(fault_pipeline(), count_memory=fail)
    estimator = StageEstimator(pipeline, FakeGauge(0, 1))
    assert estimator.refusal(request(pipeline, height=4096, width=64).params) is None
