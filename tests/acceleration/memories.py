"""Memories that stand for a device's: of the host; one that counts; and one that copies as late as it may."""

from __future__ import annotations

import os
import threading
import weakref
from typing import Any

import torch
from torch import Tensor

POISON = 0xFF
"""Of which a float's bytes are NaN."""
UNLIMITED = 1_000_000


class HostMemory:
    """Memory of the host in the place of a device's, for machines without one: every copy is done at once."""

    def free(self) -> int:
        """Return the bytes of free memory."""
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")

    def limit(self, num_bytes: int) -> None:
        """The host's memory is not limited."""

    def allocate(self, num_bytes: int) -> Tensor:
        """Return a buffer, uint8 [num_bytes]."""
        return torch.empty(num_bytes, dtype=torch.uint8)

    def pin(self, num_bytes: int) -> Tensor:
        """Return another buffer, uint8 [num_bytes]."""
        return torch.empty(num_bytes, dtype=torch.uint8)

    def mark(self) -> None:
        """Everything is done already."""

    def copy(self, target: Tensor, source: Tensor, after: Any) -> None:
        """Copy."""
        target.copy_(source)

    def wait(self, mark: Any) -> None:
        """Nothing is left to wait for."""

    def synchronize(self, mark: Any) -> None:
        """Nothing is left to wait for."""

    def trim(self) -> None:
        """There is nothing to give back."""


class CountingMemory(HostMemory):
    """Counts what is alive; a fresh buffer holds NaN."""

    def __init__(self):
        self.live = self.peak = self.pinned = self.num_copies = 0

    def allocate(self, num_bytes):
        buffer = super().allocate(num_bytes).fill_(POISON)
        self.live += num_bytes
        self.peak = max(self.peak, self.live)
        weakref.finalize(buffer.untyped_storage(), self._freed, num_bytes)
        return buffer

    def _freed(self, num_bytes):
        self.live -= num_bytes

    def pin(self, num_bytes):
        self.pinned += num_bytes
        return super().pin(num_bytes).fill_(POISON)

    def copy(self, target, source, after):
        self.num_copies += 1
        return super().copy(target, source, after)


class LateMemory(CountingMemory):
    """Copies when it is waited for, and not before: whoever does not wait, or uses a buffer again too early, sees it.

    Copies are done in the order in which they were begun, as on a stream; a mark is the number of those before it.
    """

    def __init__(self):
        super().__init__()
        self._lock = threading.Lock()
        self._begun, self._done = [], 0

    def mark(self):
        return 0  # work is done at once, and no copy waits for another but by their order

    def copy(self, target, source, after):
        with self._lock:
            self.num_copies += 1
            self._begun.append((target, source))
            return len(self._begun)

    def wait(self, mark):
        self.synchronize(mark)

    def synchronize(self, mark):
        with self._lock, torch.inference_mode(False):
            for index in range(self._done, mark):
                target, source = self._begun[index]
                target.copy_(source)
                self._begun[index] = None
            self._done = max(self._done, mark)


class FailingMemory(CountingMemory):
    """Has no room, or fails to copy, when it is told to."""

    def __init__(self):
        super().__init__()
        self.allocations_left = self.copies_left = UNLIMITED

    def allocate(self, num_bytes):
        self.allocations_left -= 1
        if self.allocations_left < 0:
            raise torch.OutOfMemoryError("no room")
        return super().allocate(num_bytes)

    def copy(self, target, source, after):
        self.copies_left -= 1
        if self.copies_left < 0:
            raise RuntimeError("the copy failed")
        return super().copy(target, source, after)
