"""The device that is computed on: which is current, what its failures mean, and the time that its work takes."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

OUT_OF_MEMORY_WORDS = ("can't allocate memory", "CUDA error: out of memory", "[CUDA]: out of memory", "_ALLOC_FAILED")
"""Parts of messages by which the host's allocator, the driver, Triton and cuBLAS say that there is no memory."""


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context in which this is the current device of its kind: libraries ask for that one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def numbered(device: torch.device) -> torch.device:
    """Return a device with its number, which `cuda` alone leaves to what is current."""
    if device.type != "cuda" or device.index is not None:
        return device
    return torch.device("cuda", torch.cuda.current_device())


def is_out_of_memory(error: BaseException | None) -> bool:
    """Say whether an error is of memory, on the device or the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY_WORDS)


def is_lost(device: torch.device, error: BaseException) -> bool:
    """Say whether a device can do nothing more for this process after an error.

    An error of the accelerator itself, but for one of memory, stays with the process: every later call raises it again.
    After other errors the device is asked, because what it was given before may have failed since.
    """
    if isinstance(error, torch.AcceleratorError):
        return not is_out_of_memory(error)
    if device.type != "cuda" or not isinstance(error, RuntimeError):
        return False
    try:
        torch.cuda.synchronize(device)
    except RuntimeError as found:
        return not is_out_of_memory(found)
    return False


class Span:
    """The time of some work: of a device that has done it when the host returns from it.

    What the device is given between its making and `end` is that work.

    Args:
        clock: seconds.

    Attributes:
        seen: when, by the host's clock, it was seen to be done; once `wait` has returned.

    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._begun = self.seen = clock()

    def end(self) -> None:
        """Say that the device has been given all of it."""
        self.seen = self._clock()

    def is_over(self) -> bool:
        """Say whether the device has done it."""
        return True

    def wait(self) -> float:
        """Wait until the device has done it; return the seconds that it took, of the host or of the device."""
        return self.seen - self._begun


class CudaSpan(Span):
    """Of work that the host gives to a CUDA device, and that is done later.

    Its seconds are the device's between two events of its own, so that neither what was given before nor idle time
    counts; or the host's, where those are more.

    Args:
        device: of CUDA.
        clock: seconds.

    """

    def __init__(self, device: torch.device, clock: Callable[[], float] = time.perf_counter) -> None:
        super().__init__(clock)
        self._device = device
        # An event that blocks lets the core sleep.
        self._first, self._last = (
            torch.cuda.Event(enable_timing=True, blocking=True)  # type: ignore[no-untyped-call]
            for _ in range(2)
        )
        self._first.record(torch.cuda.current_stream(device))

    def end(self) -> None:
        """Mark the end in the device's work."""
        self._last.record(torch.cuda.current_stream(self._device))
        super().end()

    def is_over(self) -> bool:
        """Say whether the device has come to the mark."""
        return bool(self._last.query())  # type: ignore[no-untyped-call]

    def wait(self) -> float:
        """Wait for the mark; return the seconds."""
        self._last.synchronize()
        given = super().wait()
        seconds: float = self._first.elapsed_time(self._last) / 1000
        self.seen = self._clock()
        return max(given, seconds)


def begin_span(device: torch.device, clock: Callable[[], float] = time.perf_counter) -> Span:
    """Return the span of what a device is given from now on.

    Args:
        device: whose work it is.
        clock: of the host.

    """
    return CudaSpan(device, clock) if device.type == "cuda" else Span(clock)
