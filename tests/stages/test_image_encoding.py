"""Input images become embeddings, where the model has an encoder for them."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn

from safelight.stages.image_encoding import ImageEncodingStage
from tests.stages.stubs import StubConfig, drive, request


class Encoder(nn.Module):
    """Has three hidden states of the pixels."""

    device, dtype = torch.device("cpu"), torch.float64

    def forward(self, pixels, output_hidden_states):
        assert output_hidden_states and pixels.dtype == torch.float64
        return SimpleNamespace(hidden_states=[pixels, 2 * pixels, 3 * pixels])


class Config(StubConfig):
    """Embeds the images themselves."""

    def images_to_embed(self, batch):
        return list(batch.params.image or ())


def processor(images, return_tensors):
    assert return_tensors == "pt"
    return SimpleNamespace(pixel_values=torch.tensor([[float(image)] for image in images]))


def test_the_last_hidden_state_but_one_in_the_transformers_dtype():
    batch = request(image=(1, 2))
    stage = ImageEncodingStage(Encoder(), processor, Config())
    assert stage.needed_modules(batch)
    drive(stage, batch)
    assert batch.image_embeds is not None and batch.image_embeds.dtype == torch.float32
    assert batch.image_embeds.tolist() == [[2.0], [4.0]]


def test_without_images_nothing_runs():
    batch = request()
    stage = ImageEncodingStage(Encoder(), processor, Config())
    assert not stage.needed_modules(batch)
    drive(stage, batch)
    assert batch.image_embeds is None
