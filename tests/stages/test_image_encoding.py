"""Input images become embeddings, where the model has an encoder for them."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from safelight.stages.encoders import encode_images
from safelight.stages.image_encoding import ImageEncodingStage
from tests.stages.stubs import StubConfig, drive, request


class Encoder:
    """Has three hidden states of the pixels."""

    dtype = torch.float64

    def __call__(self, pixels, output_hidden_states):
        assert output_hidden_states and pixels.dtype == torch.float64
        return SimpleNamespace(hidden_states=[pixels, 2 * pixels, 3 * pixels])


def encode(call):
    assert (call.component, call.method) == ("image_encoder", "encode")
    return encode_images(Encoder(), **call.kwargs)


class Config(StubConfig):
    """Embeds the images themselves."""

    def images_to_embed(self, batch):
        return list(batch.params.image or ())


def processor(images, return_tensors):
    assert return_tensors == "pt"
    return SimpleNamespace(pixel_values=torch.tensor([[float(image)] for image in images]))


def test_the_last_hidden_state_but_one_in_the_transformers_dtype():
    batch = request(image=(1, 2))
    drive(ImageEncodingStage(processor, Config()), batch, encode)
    assert batch.image_embeds is not None and batch.image_embeds.dtype == torch.float32
    assert batch.image_embeds.tolist() == [[2.0], [4.0]]


def test_without_images_nothing_runs():
    batch = request()
    assert drive(ImageEncodingStage(processor, Config()), batch) == []
    assert batch.image_embeds is None
