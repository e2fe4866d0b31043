"""A device's memory: weights pass through pinned buffers, whole and in time."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from safelight.acceleration.memory import NUM_BUFFERS, Carrier, CudaMemory, PinnedCopies
from tests.acceleration.memories import LateMemory

SIZES = [(3,), (64,), (0,), (40, 7), (5, 6, 7), (300,), (1,), (129,), (2, 3)]


@pytest.mark.parametrize("buffer_bytes", [64, 192, 1024])
def test_tensors_pass_whole_through_pinned_buffers(monkeypatch, buffer_bytes):
    """Longer ones in pieces, in whatever order their dimensions lie; no buffer is filled before its copy is done."""
    monkeypatch.setattr("safelight.acceleration.memory.BUFFER_BYTES", buffer_bytes)
    memory, generator = LateMemory(), torch.Generator().manual_seed(0)
    copies = PinnedCopies(memory)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        sources = [torch.randn(*size, generator=generator).to(dtype) for size in SIZES]
        sources += [torch.randn(4, 5, 6, generator=generator).to(dtype).permute(2, 0, 1)]
        targets = [torch.empty_like(source).fill_(float("nan")) for source in sources]
        copies.copy(zip(targets, sources, strict=True))
        for target, source in zip(targets, sources, strict=True):
            assert target.stride() == source.stride() and torch.equal(target, source)
    assert memory.pinned == NUM_BUFFERS * buffer_bytes and memory.num_copies > 3 * len(SIZES)


def test_modules_are_carried_in_their_own_dtypes(monkeypatch):
    monkeypatch.setattr("safelight.acceleration.memory.LEAST_PINNED", 64)
    module = nn.ModuleDict({"one": nn.Linear(9, 17), "other": nn.BatchNorm1d(33).double()})
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    memory = LateMemory()
    Carrier(torch.device("cpu"), PinnedCopies(memory)).bring_module(module)
    for name, tensor in module.state_dict().items():
        assert tensor.dtype == before[name].dtype and torch.equal(tensor, before[name])
    assert memory.num_copies > 0
    brought = Carrier(torch.device("cpu"), PinnedCopies(memory)).bring(torch.ones(50, 3).T, torch.bfloat16)
    assert brought.dtype == torch.bfloat16 and torch.equal(brought, torch.ones(3, 50, dtype=torch.bfloat16))


@pytest.mark.parametrize("name", ["cuda", "cuda:1"])
def test_a_limit_is_set_on_the_device_that_is_meant(monkeypatch, name):
    """torch takes a fraction for a device with a number alone, which `cuda` has not."""
    asked = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr("torch.cuda.memory._lazy_init", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=4000))
    monkeypatch.setattr(torch._C, "_cuda_setMemoryFraction", lambda *told: asked.append(told), raising=False)
    CudaMemory(torch.device(name)).limit(1000)
    assert asked == [(0.25, 2 if name == "cuda" else 1)]


class UnhurriedMemory(LateMemory):
    """Copies when the host waits, and not when the device's own work is told to."""

    def wait(self, mark):
        pass


def test_every_copy_is_done_before_the_buffers_go(monkeypatch):
    """A device may still read them when the host has given it everything."""
    monkeypatch.setattr("safelight.acceleration.memory.BUFFER_BYTES", 256)
    sources = [torch.randn(size) for size in (5, 40, 64, 100, 7)]
    targets = [torch.full_like(source, float("nan")) for source in sources]
    copies = PinnedCopies(UnhurriedMemory())
    copies.copy(zip(targets, sources, strict=True))
    assert not torch.equal(targets[-1], sources[-1]), "this memory shows who does not wait"
    copies.finish()
    assert all(torch.equal(target, source) for target, source in zip(targets, sources, strict=True))
