"""Input images become latents: the posterior's mode, scaled as the transformer takes it, each in a unit of its own."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn

from safelight.stages.image_vae_encoding import ImageVAEEncodingStage
from tests.stages.stubs import StubConfig, drive, request


class Vae(nn.Module):
    """Its posterior's mode is the pixels themselves."""

    device, dtype = torch.device("cpu"), torch.float32

    def encode(self, pixels):
        return SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: pixels, sample=lambda: pixels + 1))


class Config(StubConfig):
    """Images are numbers here."""

    def prepare_vae_input(self, batch, index):
        return torch.full((1, 2, 4, 4), float(batch.params.image[index]))


def test_each_image_is_encoded_by_itself():
    batch = request(image=(3, 5))
    stage = ImageVAEEncodingStage(Vae(), Config(vae_scale=(0.5, 2.0), vae_shift=(1.0, 0.0)))
    assert stage.needed_modules(batch)
    assert drive(stage, batch) == [[]], "a boundary between two"
    assert [latents[0, :, 0, 0].tolist() for latents in batch.image_latents] == [[1.0, 6.0], [2.0, 10.0]]
    assert not stage.needed_modules(batch)


def test_without_images_nothing_runs():
    batch = request()
    stage = ImageVAEEncodingStage(Vae(), Config())
    assert not stage.needed_modules(batch) and drive(stage, batch) == [] and batch.image_latents == []
