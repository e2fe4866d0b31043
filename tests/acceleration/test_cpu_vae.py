"""The libraries' VAE for pictures on the CPU, against their own in float64."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import nn

from safelight.acceleration.cpu_vae import (
    MIN_CHANNELS,
    DoublingConv,
    WidenedConv2d,
    WinogradConv2d,
    accelerate_vae,
    route_convolutions,
)
from tests.acceleration.processors import EVERYTHING
from tests.acceleration.vaes import picture_vae, relative


def test_only_fitting_convolutions_are_replaced():
    wide = MIN_CHANNELS
    kept = [
        nn.Conv2d(wide, wide, 3, padding=1, stride=2),
        nn.Conv2d(wide, wide, 3, padding=2, dilation=2),
        nn.Conv2d(wide, wide, 3),
        nn.Conv2d(wide, wide, 3, padding=1, groups=2),
        nn.Conv2d(wide, wide, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(wide, wide - 1, 3, padding=1),
        nn.Conv2d(wide, wide, 1),
        nn.Conv2d(wide, wide, 5, padding=2),
    ]
    model = nn.Sequential(*kept, nn.Conv2d(wide, wide, 3, padding=1)).requires_grad_(False)
    plain = deepcopy(model)
    route_convolutions(model, widen=True)
    assert [type(layer) for layer in model] == [nn.Conv2d] * len(kept) + [WinogradConv2d]
    half = deepcopy(plain).bfloat16()
    route_convolutions(half, widen=False)
    assert {type(layer) for layer in half} == {nn.Conv2d}
    route_convolutions(half, widen=True)
    assert {type(layer) for layer in half} == {WidenedConv2d, WinogradConv2d}
    for size in ((8, 9), (67, 65), (300, 33)):  # by the definition, and by fewer multiplications
        pixels = torch.randn(1, wide, *size)
        for routed, layer, reference in zip(half, model, plain, strict=True):
            exact = deepcopy(reference).double()(pixels.double())
            assert relative(layer(pixels), exact) < 2e-6
            assert relative(routed(pixels.bfloat16()), exact) < 1e-2


@pytest.mark.parametrize(("seed", "size"), [(0, (33, 34)), (1, (5, 7))])
def test_a_vae_keeps_its_pixels_and_latents(seed, size):
    vae = picture_vae(seed)
    ours, half, plain_half = deepcopy(vae), deepcopy(vae).bfloat16(), deepcopy(vae).bfloat16()
    accelerate_vae(ours, EVERYTHING)
    assert {type(block.upsamplers[0]) for block in ours.decoder.up_blocks if block.upsamplers} == {DoublingConv}
    accelerate_vae(half, EVERYTHING)
    assert set(ours.state_dict()) == set(vae.state_dict())
    latents = torch.randn(1, 4, *size)
    pixels = torch.randn(2, 3, size[0] + size[0] % 2, size[1] + size[1] % 2)
    exact = deepcopy(vae).double()
    for call, given in (
        (lambda vae, x: vae.decode(x).sample, latents),
        (lambda vae, x: vae.encode(x).latent_dist.mode(), pixels),
    ):
        reference = call(exact, given.double())
        assert relative(call(ours, given), reference) < 1e-5
        rounded = relative(call(half, given.bfloat16()), reference)
        assert rounded <= 1.1 * relative(call(plain_half, given.bfloat16()), reference)
        assert torch.equal(call(ours, given), call(ours, given))
