"""An engine on a device that does its work after the host has given it, and on one that fails."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from safelight.core.device import is_lost, is_out_of_memory
from safelight.errors import DeviceLostError
from safelight.runtime.supervisor.group import worker_environment
from safelight.runtime.worker.engine import Engine
from safelight.runtime.worker.watch import Watch
from tests.runtime.conftest import request

STEP = 1.0


class LateDevice:
    """Takes work at once, and does it one after another."""

    def __init__(self):
        self.now = self.busy_until = 0.0

    def give(self, seconds):
        self.busy_until = max(self.now, self.busy_until) + seconds

    def clock(self):
        self.now += 1e-6
        return self.now

    def begin(self):
        return LateSpan(self, max(self.now, self.busy_until))


@dataclass
class LateSpan:
    device: LateDevice
    first: float
    last: float = 0.0
    seen: float = 0.0

    def end(self):
        self.last = self.device.busy_until

    def is_over(self):
        return self.device.now >= self.last

    def wait(self):
        self.device.now = self.seen = max(self.device.now, self.last)
        return max(0.0, self.last - self.first)


@pytest.fixture
def device(monkeypatch, fault_family):
    from safelight_fault.pipeline import FaultPipeline

    device = LateDevice()
    monkeypatch.setattr(FaultPipeline, "sleep", staticmethod(device.give))
    return device


class Announced(Watch):
    """Keeps whose units were announced, and whether one is under way."""

    def __init__(self):
        super().__init__()
        self.current = None

    def begin(self, kind, requests):
        self.current = set(requests)
        super().begin(kind, requests)

    def rest(self):
        self.current = None
        super().rest()


@pytest.fixture
def engine(fault_pipeline, device):
    pipeline = fault_pipeline("FaultVideoPipeline", step_seconds=STEP, decode_seconds=0.5)
    return Engine(pipeline, clock=device.clock, begin=device.begin, watch=Announced())


def test_a_step_takes_the_devices_time_and_the_host_is_one_unit_ahead(engine, device):
    task = engine.add(request(engine.pipeline, num_inference_steps=6, num_frames=1))
    seen = []
    while not task.done:
        engine.tick()
        assert device.busy_until - device.now <= STEP + 0.01, "more than one unit is under way"
        if task.execution.req.stage == "denoising":
            seen.append(task.step_seconds)
    known = [seconds for seconds in seen if seconds is not None]
    assert len(known) >= 4 and known == pytest.approx([STEP] * len(known), abs=0.01)
    assert engine.policy.step_time(task.step_cost) == pytest.approx(STEP, abs=0.01)
    assert task.execution.req.timings["denoising"] == pytest.approx(6 * STEP, abs=0.01)
    assert task.execution.req.timings["decoding"] == pytest.approx(0.5, abs=0.01)
    assert task.tail_seconds == pytest.approx(0.5, abs=0.01)
    assert device.now == pytest.approx(6 * STEP + 0.5, abs=0.01)


def test_the_device_has_done_everything_of_others_before_a_request_has_its_turn(engine, device):
    """So that what fails or hangs is the announced unit, or the one before it of the same request."""
    tasks = [engine.add(request(engine.pipeline, request_id=f"r{n}", num_inference_steps=4 + n)) for n in range(3)]
    given: dict[str, float] = {}
    switches, before = 0, None
    begin = engine.watch.begin

    def announce(kind, requests):
        nonlocal switches, before
        for other, until in given.items():
            assert other in requests or device.now >= until
        switches += before is not None and list(requests) != before
        before = list(requests)
        begin(kind, requests)

    engine.watch.begin = announce
    for _ in range(100):
        for task in engine.tick():
            given[task.request_id] = device.busy_until
    assert all(task.done for task in tasks) and switches >= 2
    assert engine.watch.current is None


def test_cancelling_leaves_one_step_under_way_at_most(engine, device):
    task = engine.add(request(engine.pipeline, num_inference_steps=40, num_frames=1))
    while task.execution.req.step_index < 5:
        engine.tick()
    engine.cancel("r0")
    assert device.busy_until - device.now <= STEP + 0.01
    engine.tick()
    assert engine.watch.current is None and device.busy_until <= device.now, "nothing is under way any more"


def test_what_errors_mean():
    cpu = torch.device("cpu")
    memory = [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        torch.AcceleratorError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
    ]
    for error in memory:
        assert is_out_of_memory(error) and not is_lost(cpu, error)
    for words in (
        "device-side assert triggered",
        "an illegal memory access was encountered",
        "unspecified launch failure",
    ):
        assert is_lost(cpu, torch.AcceleratorError(f"CUDA error: {words}"))
    for error in (RuntimeError("shapes do not fit"), ValueError("out of memory"), KeyError("x")):
        assert not is_lost(cpu, error) and not is_out_of_memory(error)


def test_a_device_is_asked_after_other_errors(monkeypatch):
    """What was given to it before may have failed since."""
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    assert not is_lost(cuda, RuntimeError("shapes do not fit"))

    def failed(device):
        raise torch.AcceleratorError("CUDA error: device-side assert triggered")

    monkeypatch.setattr(torch.cuda, "synchronize", failed)
    assert is_lost(cuda, RuntimeError("shapes do not fit"))
    assert not is_lost(cuda, ValueError("not the device's"))


@pytest.mark.parametrize("batching", ["exact", "throughput"])
def test_an_engine_does_not_go_on_without_its_device(fault_pipeline, batching):
    pipeline = fault_pipeline()
    engine = Engine(pipeline, batching=batching)
    engine.add(request(pipeline, "[lost@forward:1] a cat"))
    engine.add(request(pipeline, request_id="r1"))
    with pytest.raises(DeviceLostError):
        while engine.tasks:
            engine.tick()


@pytest.mark.parametrize("moment", ["evicted", "resumed"])
def test_a_request_that_cannot_be_moved_ends_alone(fault_pipeline, monkeypatch, moment):
    """For want of memory, on the host or on the device."""
    pipeline = fault_pipeline(step_seconds=0.001)
    engine = Engine(pipeline, max_running=1)
    long = engine.add(request(pipeline, num_inference_steps=20))
    while long.execution.req.step_index < 2:
        engine.tick()
    from safelight.runtime.worker import engine as module

    moves = []

    def failing(req, device):
        moves.append(req.request_id)
        if len(moves) == ("evicted", "resumed").index(moment) + 1:
            raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(module, "move", failing)
    short = engine.add(request(pipeline, request_id="r1", num_inference_steps=1), priority=1)
    while engine.tasks:
        engine.tick()
    assert short.done and short.error is None
    assert long.done and is_out_of_memory(long.error)


def test_a_workers_allocator_has_blocks_that_can_grow(monkeypatch):
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    assert worker_environment()["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "backend:native")
    assert "PYTORCH_ALLOC_CONF" not in worker_environment()
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "max_split_size_mb:64")
    assert worker_environment()["PYTORCH_ALLOC_CONF"] == "max_split_size_mb:64"
