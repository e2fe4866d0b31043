"""What memory a device, or the host, has left, and what a forward took of it."""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from pathlib import Path

import torch

from safelight.runtime.host_memory import HostMemory


class Gauge(ABC):
    """Tells what a device's memory, or the host's, has left and what a forward takes. All in bytes."""

    @abstractmethod
    def free(self) -> int:
        """Return what a forward may take."""

    @abstractmethod
    def ceiling(self) -> int:
        """Return what a forward could take, if nothing were taken but what is now."""

    @abstractmethod
    def begin(self) -> int:
        """Return what is in use, and begin to watch for the peak."""

    @abstractmethod
    def peak(self) -> int:
        """Return the peak since `begin`."""


class CudaGauge(Gauge):
    """A CUDA device's.

    Args:
        device: of CUDA.
        limit: that torch's allocator was given; None for the whole device.

    """

    def __init__(self, device: torch.device, limit: int | None = None) -> None:
        self._device = device
        self._limit = limit

    def free(self) -> int:
        """Return what the driver and torch's allocator have left."""
        driver, _ = torch.cuda.mem_get_info(self._device)
        reserved = torch.cuda.memory_reserved(self._device)
        left = driver if self._limit is None else max(0, min(driver, self._limit - reserved))
        return left + reserved - torch.cuda.memory_allocated(self._device)

    def ceiling(self) -> int:
        """Return what is neither taken now nor out of bounds."""
        total: int = torch.cuda.get_device_properties(self._device).total_memory
        return min(total, self._limit or total) - torch.cuda.memory_allocated(self._device)

    def begin(self) -> int:
        """Return what is allocated."""
        torch.cuda.reset_peak_memory_stats(self._device)
        return torch.cuda.memory_allocated(self._device)

    def peak(self) -> int:
        """Return the most that was allocated."""
        return torch.cuda.max_memory_allocated(self._device)


class HostGauge(Gauge):
    """The host's, as Linux tells of it."""

    def __init__(self) -> None:
        self._memory = HostMemory()
        self._files = 0

    def free(self) -> int:
        """Return the least of what the machine, this process's control groups and its own limits have left."""
        return self._memory.free()

    def ceiling(self) -> int:
        """Return what there is in all, but for what this process has taken now."""
        return max(0, self._memory.total() - self._memory.own())

    def begin(self) -> int:
        """Return this process's resident memory."""
        RESET.write_text("5")  # makes the peak what is resident now
        self._files = _kilobytes("RssFile") << 10
        return _kilobytes("VmRSS") << 10

    def peak(self) -> int:
        """Return the most that was resident, but for what is mapped of files since, such as weights."""
        return (_kilobytes("VmHWM") << 10) - max(0, (_kilobytes("RssFile") << 10) - self._files)


STATUS = Path("/proc/self/status")
RESET = Path("/proc/self/clear_refs")


def _kilobytes(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB", STATUS.read_text(), re.MULTILINE)
    assert found is not None, f"{STATUS} has no {name}"
    return int(found[1])


def gauge_of(device: torch.device, limit: int | None = None) -> Gauge | None:
    """Return what tells of a device's memory, of which `limit` may be used; None for a host that does not."""
    if device.type == "cuda":
        return CudaGauge(device, limit)
    return HostGauge() if os.access(RESET, os.W_OK) else None
