"""Whether a forward fits into what memory is left, judged by earlier forwards."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from pathlib import Path

import torch

from safelight.core.request import CallMaker, ModelCall, Prediction


class Memory(ABC):
    """One device's memory, or the host's. All in bytes."""

    @abstractmethod
    def free(self) -> int:
        """Return what a forward may take."""

    @abstractmethod
    def begin(self) -> int:
        """Return what is in use, and begin to watch for the peak."""

    @abstractmethod
    def peak(self) -> int:
        """Return the peak since `begin`."""


class CudaMemory(Memory):
    """A CUDA device's."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def free(self) -> int:
        """Return what the driver and torch's allocator have left."""
        driver, _ = torch.cuda.mem_get_info(self._device)
        cached = torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
        return driver + cached

    def begin(self) -> int:
        """Return what is allocated."""
        torch.cuda.reset_peak_memory_stats(self._device)
        return torch.cuda.memory_allocated(self._device)

    def peak(self) -> int:
        """Return the most that was allocated."""
        return torch.cuda.max_memory_allocated(self._device)


class HostMemory(Memory):
    """The host's, as Linux tells of it."""

    def free(self) -> int:
        """Return what the machine has available."""
        return _kilobytes(Path("/proc/meminfo"), "MemAvailable") << 10

    def begin(self) -> int:
        """Return this process's resident memory."""
        Path("/proc/self/clear_refs").write_text("5")  # makes the peak what is resident now
        return _kilobytes(Path("/proc/self/status"), "VmRSS") << 10

    def peak(self) -> int:
        """Return the most that was resident."""
        return _kilobytes(Path("/proc/self/status"), "VmHWM") << 10


def _kilobytes(path: Path, name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB", path.read_text(), re.MULTILINE)
    assert found is not None, f"{path} has no {name}"
    return int(found[1])


def memory_of(device: torch.device) -> Memory:
    """Return a device's memory."""
    return CudaMemory(device) if device.type == "cuda" else HostMemory()


class Room:
    """Learns what a component's forward takes for each token, and says whether the next one fits.

    The first of a component is not judged: nothing is known of it.

    Args:
        memory: where forwards run.

    """

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._bytes_of_element: dict[str, float] = {}

    def has_room(self, call: ModelCall) -> bool:
        """Say whether a call fits into what is free now."""
        return self._bytes_of_element.get(call.component, 0.0) * num_elements(call) <= self._memory.free()

    def measured(self, call: ModelCall, make: CallMaker) -> Prediction:
        """Make a call, and remember what it took."""
        before = self._memory.begin()
        made = make(call)
        taken = (self._memory.peak() - before) / num_elements(call)
        self._bytes_of_element[call.component] = max(taken, self._bytes_of_element.get(call.component, 0.0))
        return made


def num_elements(call: ModelCall) -> int:
    """Return the size of a call's arguments, to which its activations are taken to be in proportion."""
    return sum(tensor.numel() for tensor in call.kwargs.values())
