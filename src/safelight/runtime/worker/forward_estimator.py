"""Whether a forward fits into the memory that is left, before it begins."""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from safelight.acceleration.activations import Valueless, count_peak, on_meta
from safelight.acceleration.blocks import one_block_each
from safelight.core.calls import ModelCall
from safelight.core.model_runner import Forward, Make
from safelight.core.trees import Tree, map_tree
from safelight.runtime.host_memory import HostMemory

MAX_COUNTED = 4096
"""Calls whose size is remembered."""


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


class Room:
    """Says whether a forward fits.

    What one takes is counted on the component without its weights, undivided. How much of that this rank takes, which
    has its share of the work, is learnt from the largest forward so far: before the first, nothing is known, and
    nothing is refused.

    Args:
        gauge: of the memory in which forwards run.
        empty_components: by name, what makes a component on the meta device; of others nothing is known.

    """

    def __init__(self, gauge: Gauge, empty_components: Mapping[str, Callable[[], nn.Module]]) -> None:
        self._gauge = gauge
        self._make_empty = empty_components
        self._empty: dict[str, nn.Module] = {}
        self._counted: dict[Hashable, int] = {}
        self._largest: dict[str, tuple[int, float]] = {}

    def has_room(self, call: ModelCall, num_stacked: int = 1) -> bool:
        """Say whether a forward fits into what is free now, of `num_stacked` calls like this one."""
        _, share = self._largest.get(call.component, (0, 0.0))
        return not share or share * self.count(call) * num_stacked <= self._gauge.free()

    def measured(self, forwards: Sequence[Forward], make: Make) -> list[Tree]:
        """Make forwards, and learn from what those of steps took."""
        return [self._measured(forward, make) for forward in forwards]

    def _measured(self, forward: Forward, make: Make) -> Tree:
        call = forward.call
        counted = 0 if call.signature is None else self.count(call)
        before = self._gauge.begin() if counted else 0
        (made,) = make([forward])
        if counted >= max(1, self._largest.get(call.component, (0, 0.0))[0]):
            # More than all of it is what a first forward of a process takes besides.
            self._largest[call.component] = (counted, min(1.0, (self._gauge.peak() - before) / counted))
        return made

    def count(self, call: ModelCall) -> int:
        """Return the bytes of activations that a call takes undivided; 0 where that cannot be known."""
        key = (call.stack_key, call.num_rows)
        if key not in self._counted:
            if len(self._counted) == MAX_COUNTED:
                self._counted.clear()
            self._counted[key] = self._count(call)
        return self._counted[key]

    def _count(self, call: ModelCall) -> int:
        if call.component not in self._make_empty:
            return 0
        if call.component not in self._empty:
            self._empty[call.component] = self._make_empty[call.component]()
        module = self._empty[call.component]
        kwargs = map_tree({**call.kwargs, **call.shared_kwargs}, on_meta)
        with Valueless(), one_block_each(module):  # one block after another takes what one takes
            return count_peak(lambda: module(**kwargs))
