"""Rows of an activation, in bands from top to bottom."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor


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
