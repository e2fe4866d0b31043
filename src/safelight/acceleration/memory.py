"""The memory of a device, as far as offload needs it: buffers, copies that overlap the work, and marks in its time."""

from __future__ import annotations

import mmap
import os
import weakref
from typing import Any, Protocol

import torch
from torch import Tensor

from safelight.core.device import numbered
from safelight.errors import SafelightError


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
