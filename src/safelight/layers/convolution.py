"""Convolutions as the decoders of VAEs need them: in bands of rows, in place, and over doubled pixels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

BAND_ROWS = 64
"""Rows that a convolution on a CPU makes at a time, where it adds to what is there already: they stay in its caches."""


def rows_at_once(frame: Tensor) -> int:
    """Return how many rows of [1, C, H, W] are made at a time: elsewhere all, because launches cost more than memory.

    What is counted on the meta device is counted for a device that is no CPU.
    """
    return BAND_ROWS if frame.device.type == "cpu" else frame.shape[2]


def channels_last(weight: Tensor) -> Tensor:
    """Return a convolution's weight so that its channels, or those of each of its frames, lie last in memory."""
    if weight.ndim == 4:
        return weight.contiguous(memory_format=torch.channels_last)
    return weight.permute(2, 0, 3, 4, 1).contiguous().permute(1, 4, 0, 2, 3)


def convolve_with_channels_last(module: nn.Module) -> None:
    """Lay the weights of 2-D convolutions as tensor cores read them; what they make is laid so, too."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            part.weight.data = channels_last(part.weight.data)


def add_conv(convolved: Tensor, frame: Tensor, weight: Tensor) -> None:
    """Add to [1, C_out, H, W] a convolution of a frame [1, C, H, W], in place, some rows at a time."""
    height, halo, rows = frame.shape[2], weight.shape[2] // 2, rows_at_once(frame)
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        above, below = min(top, halo), min(height - bottom, halo)  # rows there are beyond the band, of those it needs
        band = frame[:, :, top - above : bottom + below]
        made = F.conv2d(band, weight, padding=halo)
        convolved[:, :, top:bottom].add_(made[:, :, above : above + bottom - top])


def conv_in_place(frame: Tensor, weight: Tensor) -> Tensor:
    """Return a convolution of a frame [1, C, H, W], of as many channels, some rows at a time, in the frame's memory.

    Where all rows are made at once they lie elsewhere, and the frame's memory is free.
    """
    height, halo, rows = frame.shape[2], weight.shape[2] // 2, rows_at_once(frame)
    if rows >= height:
        return F.conv2d(frame, weight, padding=halo)
    above = None  # the last rows of the band before, as they were
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        taken = frame[:, :, top : bottom + halo]
        band = taken if above is None else torch.cat((above, taken), dim=2)
        first = 0 if above is None else halo
        above = frame[:, :, bottom - halo : bottom].clone()
        frame[:, :, top:bottom] = F.conv2d(band, weight, padding=halo)[:, :, first : first + bottom - top]
    return frame


def doubled_conv(conv: Any, frame: Tensor, halo: int = 0) -> Tensor:
    """Return a convolution of 3 by 3 over a frame whose pixels are doubled along both sides, [1, C_out, 2H, 2W].

    Three neighbours among doubled pixels are two pixels, one of them twice, whose weights are summed.

    Args:
        conv: the convolution.
        frame: [1, C, H + 2 * halo, W].
        halo: 1 where the first row and the last are neighbours of the rows that are doubled; 0 where zeros are.

    """
    height, width = frame.shape[2] - 2 * halo, frame.shape[3]
    shape = (1, conv.weight.shape[0], 2 * height, 2 * width)
    convolved = torch.empty(shape, dtype=frame.dtype, device=frame.device, memory_format=torch.channels_last)
    for row in (0, 1):
        rows = torch.stack(merged(conv.weight.float().unbind(2), row), dim=2)
        for column in (0, 1):
            weight = torch.stack(merged(rows.unbind(3), column), dim=3)
            weight = weight.to(frame.dtype, memory_format=torch.channels_last)  # rounded once, when all are summed
            made = F.conv2d(frame, weight, conv.bias, padding=(1 - halo, 1))
            convolved[:, :, row::2, column::2] = made[:, :, row : row + height, column : column + width]
    return convolved


def merged(taps: tuple[Tensor, ...], second: int) -> tuple[Tensor, Tensor]:
    """Return the weights of two pixels of three taps around the first, or the second, of a doubled pixel."""
    before, at, after = taps
    return (before + at, after) if second else (before, at + after)
