"""A causal VAE's decoder, frame by frame, against the library's own decode."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import patchify, unpatchify

from safelight.layers.causal_vae import CausalDecoder, patchified, unpatchified
from safelight.testing.recipes import shake


def test_frames_are_those_of_the_whole_video():
    torch.manual_seed(0)
    vae: Any = AutoencoderKLWan(
        base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.0] * 4, latents_std=[1.0] * 4
    )
    shake(vae, 0)
    latents = torch.randn(1, 4, 3, 4, 6)
    with torch.inference_mode():
        expected = vae.decode(latents, return_dict=False)[0]
        decoder = CausalDecoder(vae)
        cache: dict[str, Any] = {}
        counts, frames = [], []
        for index in range(3):
            made = list(decoder.decode(latents[:, :, index : index + 1], cache))
            counts.append(len(made))
            frames += made
        picture = list(decoder.decode(latents[:, :, :1], None))
    assert counts == [1, 4, 4]
    torch.testing.assert_close(torch.stack(frames, dim=2), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(picture[0], expected[:, :, 0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("patch_size", [1, 2])
def test_patches_are_the_librarys_and_come_back(patch_size):
    pixels = torch.randn(2, 3, 1, 4, 6)
    patches = patchified(pixels, patch_size)
    assert torch.equal(patches, patchify(pixels, patch_size))
    back = unpatchified(patches[:, :, 0], patch_size)
    assert torch.equal(back, unpatchify(patches, patch_size)[:, :, 0]) and torch.equal(back, pixels[:, :, 0])
