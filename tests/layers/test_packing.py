"""Patches of latents against Diffusers' own."""

from __future__ import annotations

import pytest
import torch
from diffusers import FluxPipeline

from safelight.layers.packing import pack_latents, unpack_latents


@pytest.mark.parametrize(("height", "width"), [(4, 6), (2, 2), (8, 4)])
def test_patches_are_the_references_and_come_back(height, width):
    latents = torch.randn(2, 3, height, width)
    packed = pack_latents(latents)
    assert torch.equal(packed, FluxPipeline._pack_latents(latents, 2, 3, height, width))
    assert torch.equal(unpack_latents(packed, height, width), latents)
