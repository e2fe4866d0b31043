"""Every collective between ranks: each goes through a `Communicator`, which counts calls and bytes.

Only tensors travel; what is no tensor travels as MessagePack in a tensor of bytes. Every wait ends with the timeout of
its process group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import torch
import torch.distributed as dist
from torch import Tensor

HEADER_BYTES = 1024
"""A message up to this size, less its length, is one broadcast; a longer one is two."""
LENGTH_BYTES = 8


class DesynchronisedError(Exception):
    """A rank failed where others wait for it in a collective: the group cannot go on, and must not be repaired."""


@dataclass
class Traffic:
    """What one rank has sent over an axis.

    Attributes:
        num_calls: collectives.
        num_bytes: sent by this rank to others, by the algorithm that sends least: a ring for sums and gathers.

    """

    num_calls: int = 0
    num_bytes: int = 0

    def add(self, num_bytes: float) -> None:
        """Count one collective; in a compiled graph nothing is counted, or each count would ask for another graph."""
        if torch.compiler.is_compiling():
            return
        self.num_calls += 1
        self.num_bytes += round(num_bytes)


class Communicator:
    """The ranks along one axis of the mesh, as one of them sees them. Alone on its axis, it sends nothing.

    Args:
        axis: name of the axis.
        ranks: all of them, as ranks of the world, in the order of the axis.
        group: their process group, with its timeout; None for a single rank.

    """

    def __init__(self, axis: str, ranks: Sequence[int] = (0,), group: dist.ProcessGroup | None = None) -> None:
        assert group is not None or len(ranks) == 1, "several ranks have a process group"
        self.axis = axis
        self.ranks = tuple(ranks)
        self.group = group
        self.size = len(self.ranks)
        self.rank = 0 if group is None else self.ranks.index(dist.get_rank())
        self.traffic = Traffic()

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Return the sum over ranks, the same on all; in place where the tensor is contiguous."""
        if self.size == 1:
            return tensor
        summed = tensor.contiguous()
        self.traffic.add(2 * (self.size - 1) / self.size * size_of(summed))
        dist.all_reduce(summed, group=self.group)
        return summed

    def all_gather(self, tensor: Tensor, dim: int) -> Tensor:
        """Return the tensors of all ranks, equal in shape, one after the other along `dim`."""
        return torch.cat(self.all_gather_list(tensor), dim=dim)

    def all_gather_list(self, tensor: Tensor) -> list[Tensor]:
        """Return the tensors of all ranks, equal in shape, in the order of ranks."""
        if self.size == 1:
            return [tensor]
        own = tensor.contiguous()
        self.traffic.add((self.size - 1) * size_of(own))
        gathered = [torch.empty_like(own) for _ in self.ranks]
        dist.all_gather(gathered, own, group=self.group)
        return gathered

    def all_to_all(self, chunks: Tensor) -> Tensor:
        """Send `chunks[i]` to rank i; return [size, ...], in place i what rank i sent."""
        if self.size == 1:
            return chunks
        sent = chunks.contiguous()
        self.traffic.add((self.size - 1) / self.size * size_of(sent))
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=self.group)
        return received

    def start_shift(self, tensor: Tensor) -> Shift:
        """Begin to send a tensor to the next rank of the ring, and to receive as much from the one before."""
        assert self.size > 1, "a ring of one has nobody to send to"
        sent = tensor.contiguous()
        self.traffic.add(size_of(sent))
        received = torch.empty_like(sent)
        after, before = self.ranks[(self.rank + 1) % self.size], self.ranks[self.rank - 1]
        works = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, sent, after, group=self.group),
                dist.P2POp(dist.irecv, received, before, group=self.group),
            ]
        )
        return Shift(sent, received, works)

    def exchange_edges(self, first: Tensor, last: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Give each neighbour the edge that lies next to it; return what the rank before and the one after gave.

        Args:
            first: for the rank before.
            last: for the rank after, of the same shape.

        """
        received: list[Tensor | None] = [None, None]
        operations: list[dist.P2POp] = []
        sent_bytes = 0
        for place, neighbour, edge in ((0, self.rank - 1, first), (1, self.rank + 1, last)):
            if not 0 <= neighbour < self.size:
                continue
            sent, arriving = edge.contiguous(), torch.empty(edge.shape, dtype=edge.dtype, device=edge.device)
            received[place] = arriving
            sent_bytes += size_of(sent)
            peer = self.ranks[neighbour]
            operations += [
                dist.P2POp(dist.isend, sent, peer, group=self.group),
                dist.P2POp(dist.irecv, arriving, peer, group=self.group),
            ]
        if operations:
            self.traffic.add(sent_bytes)
            for work in dist.batch_isend_irecv(operations):
                work.wait()
        return received[0], received[1]

    def broadcast(self, tensor: Tensor, source: int = 0) -> Tensor:
        """Fill the tensor on every rank with that of the rank `source` of this axis; return it, contiguous."""
        if self.size == 1:
            return tensor
        whole = tensor.contiguous()
        self.traffic.add(size_of(whole) if self.rank == source else 0)
        dist.broadcast(whole, self.ranks[source], group=self.group)
        return whole

    def broadcast_bytes(self, message: bytes | None, source: int = 0, device: torch.device | str = "cpu") -> bytes:
        """Return on every rank the message of the rank `source`; others give None."""
        if self.size == 1:
            assert message is not None
            return message
        sending = self.rank == source
        assert (message is not None) == sending, "the source alone has a message"
        content = message or b""
        header = len(content).to_bytes(LENGTH_BYTES, "little") + content[: HEADER_BYTES - LENGTH_BYTES]
        first = to_bytes(self.broadcast(to_tensor(header.ljust(HEADER_BYTES, b"\0"), device), source))
        length, content_begun = int.from_bytes(first[:LENGTH_BYTES], "little"), first[LENGTH_BYTES:]
        if length <= len(content_begun):
            return content_begun[:length]
        rest = content[len(content_begun) :] if sending else bytes(length - len(content_begun))
        return content_begun + to_bytes(self.broadcast(to_tensor(rest, device), source))

    def broadcast_tensors(
        self, tensors: Sequence[Tensor] | None, device: torch.device | str, source: int = 0
    ) -> list[Tensor]:
        """Return on every rank the tensors of the rank `source`, of any shapes and dtypes; others give None.

        What one rank alone has made, such as the embeddings of a text encoder that is not divided, is spread so.

        Args:
            tensors: at the source.
            device: where they go.
            source: rank of this axis.

        """
        if self.size == 1:
            assert tensors is not None
            return list(tensors)
        specs = [(str(tensor.dtype).removeprefix("torch."), list(tensor.shape)) for tensor in tensors or ()]
        told = self.broadcast_bytes(msgspec.msgpack.encode(specs) if tensors is not None else None, source, device)
        shapes = msgspec.msgpack.decode(told, type=list[tuple[str, list[int]]])
        buffers = tensors or [torch.empty(shape, dtype=vars(torch)[dtype], device=device) for dtype, shape in shapes]
        return [self.broadcast(buffer.to(device), source) for buffer in buffers]

    def agree(self, well: bool) -> bool:
        """Vote: return whether all is well on every rank."""
        votes = self.all_gather_list(torch.tensor([well], dtype=torch.uint8))
        return all(bool(vote) for vote in votes)


@dataclass
class Shift:
    """A tensor on its way around the ring.

    Attributes:
        sent: kept until it has left.
        received: filled when `wait` returns.
        works: torch's handles.

    """

    sent: Tensor
    received: Tensor
    works: list[dist.Work]

    def wait(self) -> Tensor:
        """Return what the rank before has sent."""
        for work in self.works:
            work.wait()
        return self.received


def size_of(tensor: Tensor) -> int:
    """Return the bytes of a tensor's elements."""
    return tensor.numel() * tensor.element_size()


def to_tensor(message: bytes, device: torch.device | str) -> Tensor:
    """Return bytes as a tensor, uint8 [N]."""
    return torch.frombuffer(bytearray(message), dtype=torch.uint8).to(device)


def to_bytes(tensor: Tensor) -> bytes:
    """Return a tensor of uint8 as bytes."""
    return tensor.cpu().numpy().tobytes()
