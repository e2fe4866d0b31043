"""Input images become latents: the posterior's mode, scaled as the transformer takes it, each in a unit of its own."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from safelight.stages.image_vae_encoding import ImageVAEEncodingStage
from safelight.stages.vae import whole
from tests.stages.stubs import StubConfig, drive, request


class Library:
    """Its posterior's mode is the pixels themselves."""

    def encode(self, pixels):
        return SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: pixels, sample=lambda: pixels + 1))


VAE = whole(Library())


def encode(call):
    assert (call.component, call.method, call.signature) == ("vae", "encode", None)
    return VAE.encoded(**call.kwargs, **call.static)


class Config(StubConfig):
    """Images are numbers here."""

    def prepare_vae_input(self, batch, index):
        return torch.full((1, 2, 4, 4), float(batch.params.image[index]))


def test_each_image_is_encoded_by_itself():
    batch = request(image=(3, 5))
    stage = ImageVAEEncodingStage(VAE, Config(vae_scale=(0.5, 2.0), vae_shift=(1.0, 0.0)))
    assert len(drive(stage, batch, encode)) == 2, "a call for each"
    assert [latents[0, :, 0, 0].tolist() for latents in batch.image_latents] == [[1.0, 6.0], [2.0, 10.0]]


def test_without_images_nothing_runs():
    batch = request()
    stage = ImageVAEEncodingStage(VAE, Config())
    assert drive(stage, batch) == [] and batch.image_latents == []
