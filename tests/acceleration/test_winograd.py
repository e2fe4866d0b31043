"""Convolutions with a quarter of the multiplications, against torch in float64."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from safelight.acceleration.winograd import PANEL_WIDTH, winograd_conv2d
from tests.acceleration.vaes import relative


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(
    ("batch", "channels", "out_channels", "height", "width"),
    [(1, 1, 1, 1, 1), (2, 5, 7, 9, 13), (1, 16, 8, 4, 600), (1, 33, 20, 531, 6), (1, 128, 64, 70, 50)],
)
def test_winograd_is_the_convolution(batch, channels, out_channels, height, width, seed):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(batch, channels, height, width, generator=generator)
    weight = torch.randn(out_channels, channels, 3, 3, generator=generator)
    bias = torch.randn(out_channels, generator=generator)
    for optional in (bias, None):
        exact = F.conv2d(pixels.double(), weight.double(), None if optional is None else optional.double(), padding=1)
        for laid in (pixels, pixels.contiguous(memory_format=torch.channels_last), pixels.mT.contiguous().mT):
            convolved = winograd_conv2d(laid, weight, optional)
            assert convolved.shape == exact.shape
            assert convolved.is_contiguous(memory_format=torch.channels_last)
            assert relative(convolved, exact) < 2e-6


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(
    ("batch", "channels", "out_channels", "height", "width"),
    [(1, 1, 1, 1, 1), (2, 5, 7, 9, 13), (1, 16, 8, 4, 131), (1, 33, 20, 70, 6), (1, 128, 64, 35, 64)],
)
def test_winograd_over_doubled_pixels_is_the_convolution(batch, channels, out_channels, height, width, seed):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(batch, channels, height, width, generator=generator)
    weight = torch.randn(out_channels, channels, 3, 3, generator=generator)
    exact = F.conv2d(F.interpolate(pixels.double(), scale_factor=2.0), weight.double(), padding=1)
    convolved = winograd_conv2d(pixels, weight, None, doubled=True)
    assert convolved.shape == exact.shape
    assert convolved.is_contiguous(memory_format=torch.channels_last)
    assert relative(convolved, exact) < 2e-6


@pytest.mark.parametrize(("height", "width"), [(41, 30), (9, PANEL_WIDTH + 1), (5, 2 * PANEL_WIDTH), (150, 3)])
@pytest.mark.parametrize("has_norm", [False, True])
def test_winograd_in_bfloat16_is_rounded_once(height, width, has_norm):
    generator = torch.Generator().manual_seed(width)
    pixels = torch.randn(2, 64, height, width, generator=generator).mul_(2).add_(1).bfloat16()
    conv: Any = nn.Conv2d(64, 32, 3, padding=1).bfloat16().requires_grad_(False)
    norm = nn.GroupNorm(16, 64).requires_grad_(False)
    norm.weight.normal_(generator=generator)
    norm.bias.normal_(generator=generator)
    given = F.silu(deepcopy(norm).double()(pixels.double())) if has_norm else pixels.double()
    exact = F.conv2d(given, conv.weight.double(), conv.bias.double(), padding=1)
    convolved = winograd_conv2d(pixels, conv.weight, conv.bias, norm if has_norm else None)
    assert convolved.dtype is torch.bfloat16
    assert relative(convolved, exact) <= 1.01 * relative(exact.bfloat16(), exact)
    widened = winograd_conv2d(pixels.float(), conv.weight.float(), conv.bias.float(), norm if has_norm else None)
    assert relative(widened, exact) < 2e-6
