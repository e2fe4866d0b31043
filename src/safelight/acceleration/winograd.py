"""Convolutions of 3 by 3 with a quarter of the multiplications (Winograd, 1980; Lavin & Gray, 2015, arXiv:1509.09308).

F(4x4, 3x3) makes 4 by 4 pixels of a window of 6 by 6 by 36 products, where the definition takes 144. Window, weights
and products are turned by small matrices. These belong to the points at which polynomials are evaluated; the usual
points 0, 1, -1, 2, -2 lose more than twice the digits of 0, 2/3, -2/3, 3/2, -3/2 (compare Barabasz et al., 2020,
arXiv:1803.10986). In float32 the relative error is about 1e-6, where the definition's is about 6e-7 (oneDNN, 256
channels).

All is done in float32, a panel of columns after the other and in it a band of rows after the other, so that the
processor's caches hold them. Activations of another dtype are cast as a row is read and rounded once as it is
written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from safelight.acceleration.group_norm import scale_and_shift

TILE = 4
"""Pixels along a side that a window makes."""

TAPS = 3
"""Pixels along a side of the weights."""

WINDOW = TILE + TAPS - 1
"""Pixels along a side of a window."""

POINTS = (Fraction(0), Fraction(2, 3), Fraction(-2, 3), Fraction(3, 2), Fraction(-3, 2))
"""Where polynomials are evaluated, besides infinity."""

PANEL_WIDTH = 128
"""Pixels that a picture's panels are wide: with 128 channels the windows of a row of tiles are 0.6 MB."""

TILES_PER_BAND = 128
"""Tiles of a band, at least: with 512 channels its windows are 9 MB."""


@cache
def transforms() -> tuple[Tensor, Tensor, Tensor]:
    """Return what turns windows [36, 36], weights [36, 9] and products [16, 36], float32.

    By Toom and Cook: rows of the matrix of weights evaluate a polynomial of degree 2 at each point, columns of that of
    products one of degree 3, and the matrix of windows holds the numerators of Lagrange's interpolation.
    """
    one, zero = Fraction(1), Fraction(0)
    of_weights, of_products, of_windows = [], [], []
    for point in POINTS:
        others = [other for other in POINTS if other != point]
        scale = one
        for other in others:
            scale *= point - other
        of_weights.append([point**power / scale for power in range(TAPS)])
        of_products.append([point**power for power in range(TILE)])
        of_windows.append([*_polynomial(others), zero])
    of_weights.append([zero] * (TAPS - 1) + [one])
    of_products.append([zero] * (TILE - 1) + [one])
    of_windows.append(_polynomial(POINTS))
    weights, products, windows = (
        torch.tensor([[float(entry) for entry in row] for row in matrix], dtype=torch.float64)
        for matrix in (of_weights, of_products, of_windows)
    )
    along_both = [torch.kron(matrix, matrix).float() for matrix in (windows, weights, products.T.contiguous())]
    return along_both[0], along_both[1], along_both[2]


def _polynomial(roots: Sequence[Fraction]) -> list[Fraction]:
    """Return the coefficients of the polynomial with these roots, the constant first."""
    coefficients = [Fraction(1)]
    for root in roots:
        raised = [Fraction(0), *coefficients]
        lowered = [*(-root * coefficient for coefficient in coefficients), Fraction(0)]
        coefficients = [up + down for up, down in zip(raised, lowered, strict=True)]
    return coefficients


@dataclass(frozen=True)
class Convolution:
    """A convolution made ready.

    Attributes:
        weight: [36, C, C_out], turned.
        bias: float32 [C_out].
        of_windows: what turns windows, [36, number of their pixels].
        step: pixels from a window to the next: as many as a tile has, or half where each stands for two by two.

    """

    weight: Tensor
    bias: Tensor | None
    of_windows: Tensor
    step: int

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None, doubled: bool) -> Self:
        """Turn a weight [C_out, C, 3, 3]. Done anew at each call: kept, it would be four times the weights."""
        taps = weight.permute(2, 3, 1, 0).reshape(TAPS * TAPS, -1).float()
        of_windows, of_weights, _ = transforms()
        turned = (of_weights @ taps).view(WINDOW * WINDOW, weight.shape[1], weight.shape[0])
        if doubled:
            spread = torch.eye(WINDOW // 2 + 1)[[(pixel + 1) // 2 for pixel in range(WINDOW)]]
            of_windows = of_windows @ torch.kron(spread, spread)
        return cls(turned, None if bias is None else bias.float(), of_windows, TILE // (1 + doubled))


def winograd_conv2d(
    pixels: Tensor, weight: Tensor, bias: Tensor | None, norm: nn.GroupNorm | None = None, doubled: bool = False
) -> Tensor:
    """Return a convolution of 3 by 3 with zeros around, channels last in memory: [B, C_out, H, W], or twice the sides.

    Args:
        pixels: [B, C, H, W]; fastest with channels last in memory.
        weight: [C_out, C, 3, 3].
        bias: [C_out].
        norm: if any, SiLU of this norm of the pixels is convolved. It is made a row at a time, never as a whole.
        doubled: whether each pixel stands for two by two, which are not made.

    """
    pixels = pixels.contiguous(memory_format=torch.channels_last)
    convolution = Convolution.of(weight, bias, doubled)
    height, width = (side * (1 + doubled) for side in pixels.shape[2:])
    shape = (pixels.shape[0], weight.shape[0], _whole(height), _whole(width))
    convolved = torch.empty(shape, dtype=pixels.dtype, device=pixels.device, memory_format=torch.channels_last)
    for picture, made in zip(pixels.permute(0, 2, 3, 1), convolved.permute(0, 2, 3, 1), strict=True):
        normalise = None if norm is None else scale_and_shift(picture, norm)
        for left in range(0, width, PANEL_WIDTH):
            _convolve(convolution, picture, normalise, left, made[:, left : left + PANEL_WIDTH])
    return convolved[:, :, :height, :width].contiguous(memory_format=torch.channels_last)


def _whole(side: int) -> int:
    """Return the pixels of as many tiles as a side needs."""
    return -(-side // TILE) * TILE


def _convolve(
    convolution: Convolution, picture: Tensor, normalise: tuple[Tensor, Tensor] | None, left: int, made: Tensor
) -> None:
    """Write into a panel [H, width, C_out] the columns from `left` on of the convolution of a picture [H, W, C].

    Windows are turned a row of tiles at a time, which stays in the nearest cache, and multiplied a band of rows at a
    time, so that the weights are read once for all of them.
    """
    step, halo = convolution.step, TAPS // 2
    window = step + 2 * halo
    channels, out_channels = picture.shape[2], made.shape[2]
    num_rows, num_columns = made.shape[0] // TILE, made.shape[1] // TILE
    rows_per_band = min(-(-TILES_PER_BAND // num_columns), num_rows)
    strip = torch.zeros(window, num_columns * step + 2 * halo, channels)
    by_row, by_column, _ = strip.stride()
    overlapping = strip.as_strided((window, window, num_columns, channels), (by_row, by_column, step * by_column, 1))
    windows = torch.empty(overlapping.shape)
    turned = torch.empty(WINDOW * WINDOW, rows_per_band, num_columns, channels)
    products = torch.empty(WINDOW * WINDOW, rows_per_band, num_columns, out_channels)
    tiles = torch.empty(TILE, TILE, num_columns, out_channels)
    of_products = transforms()[2]
    rows = made.view(num_rows, TILE, num_columns, TILE, out_channels)
    left = left // TILE * step
    picture = picture[:, max(left - halo, 0) : left + num_columns * step + halo]
    inner = strip if left else strip[:, halo:]
    _fill(inner[-halo:], picture[:halo], normalise)
    for first in range(0, num_rows, rows_per_band):
        band = rows[first : first + rows_per_band]
        for index in range(len(band)):
            top = (first + index) * step + halo
            strip[: 2 * halo] = strip[step:]
            _fill(inner[2 * halo :], picture[top : top + step], normalise)
            windows.copy_(overlapping)
            torch.mm(convolution.of_windows, windows.flatten(0, 1).flatten(1), out=turned[:, index].flatten(1))
        size = len(band)
        torch.bmm(turned[:, :size].flatten(1, 2), convolution.weight, out=products[:, :size].flatten(1, 2))
        for index, row in enumerate(band):
            torch.mm(of_products, products[:, index].flatten(1), out=tiles.flatten(0, 1).flatten(1))
            if convolution.bias is not None:
                tiles += convolution.bias
            row.copy_(tiles.transpose(1, 2))


def _fill(strip: Tensor, rows: Tensor, normalise: tuple[Tensor, Tensor] | None) -> None:
    """Copy rows of a picture into a strip's first columns, and zeros below them."""
    num_rows, num_columns, _ = rows.shape
    inside = strip[:num_rows, :num_columns]
    if normalise is None:
        inside.copy_(rows)
    else:
        scale, shift = normalise
        F.silu(torch.addcmul(shift, rows.float(), scale, out=inside), inplace=True)
    strip[num_rows:] = 0
