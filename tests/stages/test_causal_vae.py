"""Latent frames one by one: the library's own encode and decode, and how many units and frames they are."""

from __future__ import annotations

import pytest
import torch

from safelight.layers.causal_vae import CausalDecoder
from safelight.stages.causal_vae import CausalFrameDecoder, CausalFrameEncoder
from tests.acceleration.vaes import small

KINDS = ("Wan 2.1", "Wan 2.2")


@pytest.fixture(params=KINDS)
def vae(request):
    return small(request.param)


@pytest.mark.parametrize("num_frames", [1, 5, 9])
def test_an_encode_in_units_is_the_librarys(vae, num_frames):
    channels, patch = 3, vae.config.get("patch_size") or 1
    pixels = torch.randn(1, channels, num_frames, 32, 48, generator=torch.Generator().manual_seed(num_frames))
    encoder = CausalFrameEncoder(vae)
    with torch.inference_mode():
        expected = vae.encode(pixels).latent_dist.mode()
        state = encoder.begin(pixels.clone())
        parts = [encoder.encode(state, index) for index in range(encoder.num_units(pixels.shape))]
    assert len(parts) == expected.shape[2] == 1 + (num_frames - 1) // 4
    assert torch.allclose(torch.cat(parts, dim=2), expected, atol=1e-5) and patch in (1, 2)


@pytest.mark.parametrize("num_latents", [1, 3])
def test_a_decode_in_units_is_the_librarys(vae, num_latents):
    latents = torch.randn(1, vae.config["z_dim"], num_latents, 4, 6, generator=torch.Generator().manual_seed(1))
    decoder = CausalFrameDecoder(CausalDecoder(vae))
    with torch.inference_mode():
        expected = vae.decode(latents, return_dict=False)[0]
        shape = decoder.output_shape(latents.shape)
        video, state = torch.full(shape, torch.nan), decoder.begin(latents.clone())
        for unit in decoder.units(latents.shape):
            for piece in unit.run(state):
                rows = piece.pixels.shape[2]
                video[:, piece.frame : piece.frame + piece.pixels.shape[1], piece.top : piece.top + rows] = piece.pixels
    assert shape == tuple(expected.shape[1:])
    assert torch.allclose(video, expected[0], atol=1e-4)
