"""A rank's part of a tensor that lies in a checkpoint, or in memory. Importing this imports no model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shard:
    """What one rank has of a tensor.

    Attributes:
        full_shape: of the tensor.
        dim: along which it is divided.
        pieces: (begin, end) along `dim`, one after the other in the shard; none at all where another rank has the
            tensor, and zeros of its full shape stand here.

    """

    full_shape: tuple[int, ...]
    dim: int
    pieces: tuple[tuple[int, int], ...]

    def read(self, stored: Any) -> Tensor:
        """Return the shard of a tensor, or of a slice of a safetensors file, of which nothing else is read."""
        before = (slice(None),) * self.dim
        pieces: list[Tensor] = [stored[(*before, slice(begin, end))] for begin, end in self.pieces]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=self.dim)


def divided(full_shape: Sequence[int], dim: int, parts: Sequence[int], rank: int, size: int) -> Shard | None:
    """Return a rank's shard of a tensor whose parts along `dim` are divided each by itself; None if one does not.

    Args:
        full_shape: of the tensor.
        dim: along which.
        parts: how long they are in proportion, such as (1, 4).
        rank: of `size`.
        size: number of ranks.

    """
    unit, rest = divmod(full_shape[dim], sum(parts))
    if rest or any(part * unit % size for part in parts):
        return None
    pieces, begun = [], 0
    for part in parts:
        length = part * unit // size
        pieces.append((begun + rank * length, begun + (rank + 1) * length))
        begun += part * unit
    return Shard(tuple(full_shape), dim, tuple(pieces))
