"""What encoders' methods compute."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from safelight.core.pipeline import standard_methods
from safelight.stages.encoders import encode_images, encode_text


def test_a_text_encoder_gives_the_output_that_is_asked_for():
    def encoder(input_ids):
        return {"last_hidden_state": input_ids + 1, "pooler_output": input_ids + 2}

    ids = torch.zeros(1)
    assert encode_text(encoder, "pooler_output", input_ids=ids).item() == 2
    assert encode_text(encoder, "last_hidden_state", input_ids=ids).item() == 1


def test_an_image_encoder_gives_its_last_hidden_state_but_one():
    class Encoder:
        dtype = torch.float64

        def __call__(self, pixels, output_hidden_states):
            assert output_hidden_states
            return SimpleNamespace(hidden_states=[pixels, pixels * 2, pixels * 3])

    made = encode_images(Encoder(), torch.ones(1))
    assert made.dtype == torch.float64 and made.item() == 2


def test_components_have_methods_by_the_kind_in_their_name():
    methods = standard_methods(dict.fromkeys(["text_encoder", "text_encoder_3", "image_encoder", "transformer"]), None)
    assert {name: list(found) for name, found in methods.items()} == {
        "text_encoder": ["encode"],
        "text_encoder_3": ["encode"],
        "image_encoder": ["encode"],
    }
