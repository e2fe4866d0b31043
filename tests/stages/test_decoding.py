"""Latents to pixels: scaled for the VAE, rounded for files, and never of NaN."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor

from safelight.errors import NonFiniteOutputError
from safelight.stages.decoding import DecodingStage, check_finite, to_media
from safelight.stages.vae import whole
from tests.stages.stubs import StubConfig, drive, request


class Library:
    """Shows what it is given, as pixels, its last channel thrice."""

    def decode(self, latents, return_dict=True):
        assert not return_dict
        return (latents[:, -1:].expand(-1, 3, *latents.shape[2:]),)


VAE = whole(Library())


def decode(call):
    assert (call.component, call.method, call.signature) == ("vae", "decode", None)
    return VAE.decoded(**call.kwargs, **call.static)


def decoded(output_type, latents, **config: Any):
    batch = request(output_type=output_type)
    batch.latents = latents
    drive(DecodingStage(VAE, StubConfig(**config)), batch, decode)
    return batch.outputs


def test_the_vae_is_given_scaled_and_shifted_latents():
    (picture,) = decoded("pt", torch.full((1, 2, 4, 2), 0.1), vae_scale=(9.0, 0.5), vae_shift=(9.0, 0.3))
    assert picture.shape == (4, 2, 3) and picture.dtype == torch.float32
    torch.testing.assert_close(picture, torch.full((4, 2, 3), (0.1 / 0.5 + 0.3) / 2 + 0.5))


def test_latents_are_given_as_the_loop_left_them():
    latents = torch.randn(1, 2, 4, 2)
    (given,) = decoded("latent", latents)
    assert torch.equal(given, latents[0])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_becomes_no_picture(bad):
    latents = torch.zeros(1, 2, 4, 2)
    latents[0, 0, 0, 0] = bad
    with pytest.raises(NonFiniteOutputError, match="latents"):
        decoded("pil", latents)
    with pytest.raises(NonFiniteOutputError, match="pixels"):
        check_finite(latents, "pixels")
    check_finite(torch.zeros(1), "pixels")


def test_pixels_are_rounded_as_the_reference_rounds_them():
    pixels = torch.linspace(-1.2, 1.2, 3 * 40).view(3, 8, 5)
    (expected,) = VaeImageProcessor().postprocess(pixels[None], "pil")
    media = to_media(pixels, "pil")
    assert media.dtype == torch.uint8 and np.array_equal(media.numpy(), np.asarray(expected))
    assert torch.equal(to_media(pixels, "np"), VaeImageProcessor().postprocess(pixels[None], "pt")[0].movedim(0, -1))
