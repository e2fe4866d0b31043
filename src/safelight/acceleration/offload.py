"""Offload: weights wait on the host, and come to the device when they are used; whole components, or block by block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from safelight.acceleration.blocks import repeated_blocks
from safelight.acceleration.memory import DeviceMemory, PinnedCopies
from safelight.core.residency import Placement, Residency

ALIGNMENT = 512
"""Bytes to which each tensor of a buffer is aligned, as the allocator of CUDA aligns them."""
NUM_SLOTS = 2
"""Blocks on the device beside those that stay: one works, the next one is copied."""
COPY_SECONDS = 120.0
"""After which a copy counts as lost."""
is_dense = torch.ops.aten.is_non_overlapping_and_dense.default
"""Says whether a tensor's elements lie side by side, in whatever order of its dimensions."""


class Packed:
    """The tensors of a module, and where each of them lies in one buffer on the device.

    Args:
        tensors: parameters and buffers, each once; where they lie now is their place on the host.

    Attributes:
        num_bytes: of the buffer.

    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = list(tensors)
        self._host = [tensor.detach() if is_dense(tensor) else tensor.detach().contiguous() for tensor in tensors]
        self._offsets: list[int] = []
        self.num_bytes = 0
        for tensor in self._host:
            self._offsets.append(self.num_bytes)
            self.num_bytes += aligned(tensor.nbytes)

    def views(self, buffer: Tensor) -> list[Tensor]:
        """Return the tensors' places in a buffer, uint8 [num_bytes] or more; strides are those on the host."""
        views = []
        for tensor, offset in zip(self._host, self._offsets, strict=True):
            flat = buffer[offset : offset + tensor.nbytes].view(tensor.dtype)
            views.append(flat.as_strided(tensor.shape, tensor.stride()))
        return views

    def pairs(self, views: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Return the weights' places in a buffer, each with where they are on the host."""
        return list(zip(views, self._host, strict=True))

    def use(self, views: Sequence[Tensor]) -> None:
        """Let the module's tensors be those of a buffer."""
        for tensor, view in zip(self._tensors, views, strict=True):
            tensor.data = view

    def restore(self) -> None:
        """Let the module's tensors be those on the host."""
        self.use(self._host)


def aligned(num_bytes: int) -> int:
    """Return the bytes that a tensor takes in a buffer."""
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def tensors_of(module: nn.Module) -> list[Tensor]:
    """Return parameters and buffers, each once however often it is used."""
    return [*module.parameters(), *module.buffers()]


class WholeModule:
    """A component that comes and goes as a whole.

    Args:
        packed: its tensors.
        memory: where it runs.
        copies: bring it there; its own unless given.

    Attributes:
        num_bytes: that it takes on the device.

    """

    def __init__(self, packed: Packed, memory: DeviceMemory, copies: PinnedCopies | None = None) -> None:
        self.num_bytes = packed.num_bytes
        self._packed = packed
        self._memory = memory
        self._copies = copies or PinnedCopies(memory)

    @torch.inference_mode(False)
    def enter(self) -> None:
        """Copy it to the device."""
        views = self._packed.views(self._memory.allocate(self.num_bytes))
        with torch.no_grad():
            self._copies.copy(self._packed.pairs(views))
        self._packed.use(views)

    @torch.inference_mode(False)
    def leave(self) -> None:
        """Let go of the copy."""
        self._packed.restore()
        self._memory.trim()


class Stager:
    """Copies blocks through two pinned buffers, in a thread of its own: mapped pages are read while the device works.

    Args:
        memory: where they go.
        num_bytes: of the largest block.

    """

    def __init__(self, memory: DeviceMemory, num_bytes: int) -> None:
        self._memory = memory
        self._buffers = [memory.pin(num_bytes) for _ in range(NUM_SLOTS)]
        self._marks: list[Any] = [memory.mark() for _ in self._buffers]
        self._worker = ThreadPoolExecutor(1, "offload")
        self._turn = 0

    def begin(self, packed: Packed, target: Tensor, after: Any) -> Future[Any]:
        """Begin to copy a block into a buffer on the device, once it has passed a mark; return the copy's mark."""
        return self._worker.submit(self._copy, packed, target, after)

    def _copy(self, packed: Packed, target: Tensor, after: Any) -> Any:
        self._turn = (self._turn + 1) % len(self._buffers)
        self._memory.synchronize(self._marks[self._turn])  # the last copy from this buffer
        staged = self._buffers[self._turn][: packed.num_bytes]
        with torch.no_grad():
            for view, tensor in packed.pairs(packed.views(staged)):
                view.copy_(tensor)
        self._marks[self._turn] = self._memory.copy(target[: packed.num_bytes], staged, after)
        return self._marks[self._turn]


@dataclass
class Slot:
    """A place on the device for one block after another.

    Attributes:
        buffer: uint8, as large as the largest block.
        free: the mark behind the last work that used it.
        views: places of each block's tensors in the buffer, made when they are first needed.
        block: number of the block that is in it or on its way; None for none.
        copied: gives the mark behind that block's copy.

    """

    buffer: Tensor
    free: Any
    views: dict[int, list[Tensor]]
    block: int | None = None
    copied: Future[Any] | None = None


class BlockStream:
    """The blocks of a module of which some stay on the device, while the others come one after another.

    While one block works the next is copied; after the last comes the first, for the next call. A block that is called
    out of order is copied then: only the overlap is lost.

    Args:
        blocks: the module's repeated blocks, in the order in which they run.
        num_resident: how many of them stay; they are spread evenly.
        stager: copies the others.
        memory: where they run.

    Attributes:
        num_bytes: of the slots.
        bytes_copied: of blocks, so far.

    """

    def __init__(self, blocks: Sequence[nn.Module], num_resident: int, stager: Stager, memory: DeviceMemory) -> None:
        staying = spread(num_resident, len(blocks))
        self.blocks = [block for index, block in enumerate(blocks) if index not in staying]
        self._packed = [Packed(tensors_of(block)) for block in self.blocks]
        self.num_bytes = NUM_SLOTS * max(packed.num_bytes for packed in self._packed)
        self._stager = stager
        self._memory = memory
        self._slots: list[Slot] = []
        self._running: Slot | None = None
        self.bytes_copied = 0
        for index, block in enumerate(self.blocks):  # for good: a request's copy of the module has them too
            block.register_forward_pre_hook(lambda *_, index=index: self._arrive(index))
            block.register_forward_hook(lambda *_: self._finish())

    @torch.inference_mode(False)
    def open(self) -> None:
        """Make the slots, and begin to copy the first block."""
        slots = [self._memory.allocate(self.num_bytes // NUM_SLOTS) for _ in range(NUM_SLOTS)]
        self._slots = [Slot(buffer, self._memory.mark(), {}) for buffer in slots]
        self._begin(0, self._slots[0])

    @torch.inference_mode(False)
    def close(self) -> None:
        """Wait for copies on their way, and let go of the slots."""
        self._finish()
        for slot in self._slots:
            if slot.copied is not None and slot.copied.exception(COPY_SECONDS) is None:
                self._memory.synchronize(slot.copied.result())
        self._slots = []

    @torch.inference_mode(False)
    def _arrive(self, index: int) -> None:
        """Let a block wait for its copy, and begin to copy the next. Without slots it runs where it is."""
        if not self._slots:
            return
        self._finish()  # of a block that was left by an exception
        slot = next((slot for slot in self._slots if slot.block == index), None)
        if slot is None:
            slot = self._slots[0]
            self._begin(index, slot)
        assert slot.copied is not None
        try:
            self._memory.wait(slot.copied.result(COPY_SECONDS))
        except BaseException:
            slot.block = None  # what is in it is not this block
            raise
        self._packed[index].use(slot.views[index])
        self._running = slot
        following = (index + 1) % len(self.blocks)
        if all(other.block != following for other in self._slots):
            self._begin(following, next(other for other in self._slots if other is not slot))

    @torch.inference_mode(False)
    def _finish(self) -> None:
        """Let go of the block that runs: its slot is free when the device has done what it was given so far."""
        if self._running is not None:
            assert self._running.block is not None
            self._running.free = self._memory.mark()
            self._packed[self._running.block].restore()
            self._running = None

    def _begin(self, index: int, slot: Slot) -> None:
        packed = self._packed[index]
        if index not in slot.views:
            slot.views[index] = packed.views(slot.buffer)
        slot.block = index
        slot.copied = self._stager.begin(packed, slot.buffer, slot.free)
        self.bytes_copied += packed.num_bytes


def spread(count: int, total: int) -> frozenset[int]:
    """Return `count` of `total` places, spread evenly.

    >>> sorted(spread(2, 6))
    [2, 5]
    """
    return frozenset(index for index in range(total) if (index + 1) * count // total > index * count // total)


class StreamedModule:
    """A component of which the rest and some blocks come and go as a whole, while the other blocks stream.

    Args:
        module: the component.
        stream: of its blocks.
        memory: where it runs.
        copies: bring the rest there; its own unless given.

    Attributes:
        num_bytes: that it takes on the device.

    """

    def __init__(
        self, module: nn.Module, stream: BlockStream, memory: DeviceMemory, copies: PinnedCopies | None = None
    ) -> None:
        streamed = {id(tensor) for block in stream.blocks for tensor in tensors_of(block)}
        self._stream = stream
        rest = [tensor for tensor in tensors_of(module) if id(tensor) not in streamed]
        self._rest = WholeModule(Packed(rest), memory, copies)
        self.num_bytes = self._rest.num_bytes + stream.num_bytes

    def enter(self) -> None:
        """Copy what stays, and begin to copy the first block."""
        self._rest.enter()
        try:
            self._stream.open()
        except BaseException:
            self._rest.leave()
            raise

    def leave(self) -> None:
        """Let go of everything on the device."""
        self._stream.close()
        self._rest.leave()


def streamed_bytes(blocks: Sequence[nn.Module], num_resident: int) -> int:
    """Return the bytes of the largest block that streams."""
    staying = spread(num_resident, len(blocks))
    return max(packed_bytes(block) for index, block in enumerate(blocks) if index not in staying)


def packed_bytes(module: nn.Module) -> int:
    """Return the bytes that a module takes on the device."""
    return Packed(tensors_of(module)).num_bytes


def offload(
    modules: Mapping[str, nn.Module], rooms: Mapping[str, int], resident_blocks: Mapping[str, int], memory: DeviceMemory
) -> Residency:
    """Let components wait on the host until they are used.

    Args:
        modules: those that come and go, by name; they lie on the host.
        rooms: for each of them, the bytes that they may take together while it runs.
        resident_blocks: of those whose blocks stream, how many stay on the device.
        memory: where they run.

    """
    blocks = {name: repeated_blocks(modules[name]) for name in resident_blocks}
    streams: dict[str, BlockStream] = {}
    if blocks:
        largest = max(streamed_bytes(blocks[name], count) for name, count in resident_blocks.items())
        stager = Stager(memory, largest)  # one for all: of alternates one is on the device
        streams = {name: BlockStream(blocks[name], count, stager, memory) for name, count in resident_blocks.items()}
    copies = PinnedCopies(memory)  # one for all: components come one after another
    copies.prepare()
    placements: dict[str, Placement] = {
        name: StreamedModule(module, streams[name], memory, copies)
        if name in streams
        else WholeModule(Packed(tensors_of(module)), memory, copies)
        for name, module in modules.items()
    }
    return Residency(placements, rooms)
