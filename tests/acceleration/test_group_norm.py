"""The group norm over channels last, against torch in float64."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from safelight.acceleration.group_norm import MIN_PIXELS, group_norm_silu
from tests.acceleration.vaes import relative


@pytest.mark.parametrize("mean", [0.0, 100.0])
@pytest.mark.parametrize(
    ("batch", "channels", "groups", "height", "width"), [(2, 8, 2, 5, 7), (1, 32, 32, 129, 65), (1, 96, 3, 300, 90)]
)
def test_group_norm_is_as_exact_as_channels_first(batch, channels, groups, height, width, mean):
    generator = torch.Generator().manual_seed(channels)
    pixels = torch.randn(batch, channels, height, width, generator=generator) * 3 + mean
    norm = nn.GroupNorm(groups, channels, eps=1e-6).requires_grad_(False)
    norm.weight.normal_(generator=generator)
    norm.bias.normal_(generator=generator)
    exact = F.silu(deepcopy(norm).double()(pixels.double()))
    for laid in (pixels, pixels.contiguous(memory_format=torch.channels_last)):
        activated = group_norm_silu(laid, norm)
        assert activated.is_contiguous(memory_format=torch.channels_last)
        assert relative(activated, exact) < max(2e-7, 2 * relative(F.silu(norm(pixels)), exact))
    half = pixels.bfloat16()
    exact = F.silu(deepcopy(norm).double()(half.double()))
    rounded = exact.bfloat16() if height * width >= MIN_PIXELS else F.silu(norm.bfloat16()(half))
    assert relative(group_norm_silu(half, norm), exact) <= 1.01 * relative(rounded, exact)
