"""Decoding in bands of rows: what a decoder that works so gives to whoever drives it.

A decode is a list of units that is known from the shape of the latents alone. What lies between two units is in a
state, plain containers of tensors, so that it may be moved, or dropped, between any two.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

State = dict[str, list[Any]]
"""What a decode keeps from one unit to the next. Only the request refers to it, and it may be rebuilt between them."""


@dataclass(frozen=True)
class Piece:
    """Rows of decoded frames.

    Attributes:
        frame: number of the first frame.
        top: number of the first row.
        pixels: [C, T, rows, W], in [-1, 1] but for what the decoder overshoots.

    """

    frame: int
    top: int
    pixels: Tensor


@dataclass(frozen=True)
class Unit:
    """A bounded piece of a decode.

    Attributes:
        cost: multiplications and additions of two numbers, about.
        run: does the work on the state, in place, and returns the pixels that are finished.

    """

    cost: int
    run: Callable[[State], Sequence[Piece]]


class BandDecoder(ABC):
    """Decodes latents in bands of rows. It keeps nothing of a decode."""

    @abstractmethod
    def begin(self, latents: Tensor) -> State:
        """Return the state before the first unit, of the latents of one picture or video, as the VAE takes them."""

    @abstractmethod
    def units(self, latent_shape: Sequence[int]) -> Iterator[Unit]:
        """Yield the units in order, for latents of this shape."""

    @abstractmethod
    def output_shape(self, latent_shape: Sequence[int]) -> tuple[int, int, int, int]:
        """Return the shape [C, T, H, W] of the pixels, for latents of this shape."""


@dataclass
class Bands:
    """The rows of an activation that are still needed, in bands from top to bottom.

    Attributes:
        first: number of the first row.
        bands: [1, C, rows, W] each.
        moments: [3, G] float64: of each group of channels the number of values, their mean, and the sum of squared
            distances from it, over the rows made so far; None where nothing was counted.

    """

    first: int = 0
    bands: list[Tensor] = field(default_factory=list)
    moments: Tensor | None = None

    def views(self, top: int, bottom: int) -> Iterator[Tensor]:
        """Yield the rows from `top` to `bottom`, a view of each band that has some."""
        row = self.first
        for band in self.bands:
            above, below = max(top - row, 0), min(bottom - row, band.shape[2])
            if above < below:
                yield band[:, :, above:below]
            row += band.shape[2]

    def rows(self, top: int, bottom: int) -> Tensor:
        """Return the rows from `top` to `bottom`, [1, C, rows, W]: a view where one band has them all."""
        views = list(self.views(top, bottom))
        return views[0] if len(views) == 1 else torch.cat(views, dim=2)

    def release(self, row: int) -> None:
        """Let go of the bands that end at or above a row."""
        while self.bands and self.first + self.bands[0].shape[2] <= row:
            self.first += self.bands.pop(0).shape[2]


def cuts(height: int, rows: int) -> Iterator[tuple[int, int]]:
    """Yield the first row and the one after the last of bands of at most so many rows, about equally high."""
    num_bands = -(-height // rows)
    for index in range(num_bands):
        yield index * height // num_bands, (index + 1) * height // num_bands
