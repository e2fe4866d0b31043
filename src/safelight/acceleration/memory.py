"""The memory of a device, as far as offload needs it: buffers, copies that overlap the work, and marks in its time."""

from __future__ import annotations

import mmap
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from safelight.core.device import numbered
from safelight.errors import SafelightError

NUM_BUFFERS, BUFFER_BYTES = 2, 64 * 2**20
"""Pinned buffers through which weights pass: one is filled while the other is copied."""
LEAST_PINNED = 2**20
"""Bytes of a tensor from which pinned buffers are worth it."""


class DeviceMemory(Protocol):
    """Where components run, and how their weights come there. Marks are the device's own, and stay within it."""

    def free(self) -> int:
        """Return the bytes of the device that nobody uses."""

    def limit(self, num_bytes: int) -> None:
        """Let no more than so many bytes be used from now on."""

    def allocate(self, num_bytes: int) -> Tensor:
        """Return a buffer on the device, uint8 [num_bytes]."""

    def pin(self, num_bytes: int) -> Tensor:
        """Return a buffer on the host that `copy` reads from, uint8 [num_bytes], exactly so large."""

    def mark(self) -> Any:
        """Return a mark that the device passes when it has done the work that it was given so far."""

    def copy(self, target: Tensor, source: Tensor, after: Any) -> Any:
        """Begin to copy a pinned buffer to the device, beside its work, once it has passed a mark.

        Returns the mark that is passed when the copy is done; until then neither buffer may be touched.
        """

    def wait(self, mark: Any) -> None:
        """Let the work that the device is given from now on wait for a mark; the host goes on."""

    def synchronize(self, mark: Any) -> None:
        """Wait on the host until the device has passed a mark."""

    def trim(self) -> None:
        """Give what was freed back to the device."""


class CudaMemory:
    """Memory of a CUDA device. Copies run on a stream of their own.

    Args:
        device: a CUDA device.

    """

    def __init__(self, device: torch.device) -> None:
        self._device = numbered(device)
        self._copies = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def free(self) -> int:
        """Return the bytes of the device that nobody uses."""
        return int(torch.cuda.mem_get_info(self._device)[0])

    def limit(self, num_bytes: int) -> None:
        """Let the allocator of this process take no more than so many bytes of the device."""
        total = torch.cuda.get_device_properties(self._device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, num_bytes / total), self._device)

    def allocate(self, num_bytes: int) -> Tensor:
        """Return a buffer on the device, uint8 [num_bytes]."""
        return torch.empty(num_bytes, dtype=torch.uint8, device=self._device)

    def pin(self, num_bytes: int) -> Tensor:
        """Return pages of the host that are registered with the driver; torch would pin the next power of two.

        Raises:
            SafelightError: if the system does not let so many bytes be pinned.

        """
        pages = torch.frombuffer(mmap.mmap(-1, num_bytes), dtype=torch.uint8)
        runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        failed = int(runtime.cudaHostRegister(pages.data_ptr(), num_bytes, 0))
        if failed:
            raise SafelightError(f"{num_bytes:,} bytes of the host cannot be pinned (CUDA error {failed})")
        # Views keep the storage and not this tensor: whoever asked for it holds it as long as copies are made.
        weakref.finalize(pages, runtime.cudaHostUnregister, pages.data_ptr())
        return pages

    def mark(self) -> torch.cuda.Event:
        """Return a mark behind the work of the current stream."""
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event

    def copy(self, target: Tensor, source: Tensor, after: torch.cuda.Event) -> torch.cuda.Event:
        """Begin to copy on the stream of copies; return the mark that is passed when it is done."""
        with torch.cuda.stream(self._copies):
            self._copies.wait_event(after)
            target.copy_(source, non_blocking=True)
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record(self._copies)
        return done

    def wait(self, mark: torch.cuda.Event) -> None:
        """Let the current stream wait for a mark."""
        torch.cuda.current_stream(self._device).wait_event(mark)

    def synchronize(self, mark: torch.cuda.Event) -> None:
        """Wait on the host until a mark is passed."""
        mark.synchronize()

    def trim(self) -> None:
        """Give cached blocks back, so that large ones can be made of them."""
        torch.cuda.empty_cache()


class PinnedCopies:
    """Copies weights to a device through two pinned buffers: pages of a file are read while the device copies.

    Args:
        memory: the device's.

    """

    def __init__(self, memory: DeviceMemory) -> None:
        self._memory = memory
        self._buffers: list[Tensor] = []
        self._marks: list[Any] = []
        self._turn = self._used = 0

    def prepare(self) -> None:
        """Pin the buffers now, and not when they are first used: where that cannot be done the start fails.

        Raises:
            SafelightError: if the system does not let so many bytes be pinned.

        """
        if not self._buffers:
            self._buffers = [self._memory.pin(BUFFER_BYTES) for _ in range(NUM_BUFFERS)]
            self._marks = [self._memory.mark() for _ in self._buffers]

    def copy(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Copy tensors; the device's work from now on waits for them, and the sources are free.

        Args:
            pairs: target on the device and source on the host, of one shape, dtype and strides, each dense.

        """
        self.prepare()
        after = self._memory.mark()
        for target, source in pairs:
            if not source.nbytes:
                continue
            pieces = (torch.split(flat(tensor), BUFFER_BYTES) for tensor in (target, source))
            for place, piece in zip(*pieces, strict=True):
                staged = self._room(piece.nbytes)
                staged.copy_(piece)
                self._marks[self._turn] = self._memory.copy(place, staged, after)
        self._memory.wait(self._marks[self._turn])

    def finish(self) -> None:
        """Wait on the host until every copy is done: before then the buffers may not go."""
        for mark in self._marks:
            self._memory.synchronize(mark)

    def _room(self, num_bytes: int) -> Tensor:
        """Return a part of a buffer that no copy reads any more."""
        if self._used + num_bytes > BUFFER_BYTES:
            self._turn, self._used = (self._turn + 1) % NUM_BUFFERS, 0
            self._memory.synchronize(self._marks[self._turn])
        staged = self._buffers[self._turn][self._used : self._used + num_bytes]
        self._used = min(BUFFER_BYTES, -(-(self._used + num_bytes) // 64) * 64)
        return staged


def flat(tensor: Tensor) -> Tensor:
    """Return a dense tensor's bytes as they lie in memory, uint8 [num_bytes]."""
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)


class Carrier:
    """Brings tensors from the host to a device.

    Args:
        device: where they go.
        copies: for large ones; None for a device whose memory is the host's.

    """

    def __init__(self, device: torch.device, copies: PinnedCopies | None) -> None:
        self._device = device
        self._copies = copies

    def bring(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """Return a tensor on the device and in a dtype, which is changed there."""
        if self._copies is None or tensor.device.type != "cpu" or tensor.nbytes < LEAST_PINNED:
            return tensor.to(self._device, dtype)
        source = tensor.contiguous()
        target = torch.empty_like(source, device=self._device)
        self._copies.copy([(target, source)])
        return target.to(dtype)

    def bring_module(self, module: nn.Module) -> None:
        """Bring a module's parameters and buffers, each in its own dtype, in place."""
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.data = self.bring(tensor.data, tensor.dtype)


@contextmanager
def carrier(device: torch.device) -> Iterator[Carrier]:
    """Give what brings tensors from the host to a device; afterwards they are there."""
    copies = PinnedCopies(CudaMemory(device)) if device.type == "cuda" else None
    try:
        yield Carrier(device, copies)
    finally:
        if copies is not None:
            copies.finish()
