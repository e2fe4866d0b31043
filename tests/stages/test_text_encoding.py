"""Prompts become embeddings: which of the encoder's outputs, cut to what, and said when they are cut."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from safelight.core.config import PromptSpec
from safelight.stages.text_encoding import TextEncodingStage, encoder_name
from tests.stages.stubs import StubConfig, drive, request

START, WORD, PADDING = 1, 2, 0


class Tokenizer:
    """A token for a start, and one a word: its length."""

    def __call__(
        self, text, padding="do_not_pad", max_length=None, truncation=False, return_tensors=None, verbose=True
    ):
        ids = [START, *(WORD + len(word) for word in text.split())]
        if return_tensors is None:
            return SimpleNamespace(input_ids=ids)
        ids = ids[:max_length]
        mask = [1] * len(ids)
        missing = max_length - len(ids) if padding == "max_length" else 0
        return SimpleNamespace(
            input_ids=torch.tensor([ids + [PADDING] * missing]), attention_mask=torch.tensor([mask + [0] * missing])
        )


def encode(call):
    """An encoder whose hidden states are the ids, and whose pooled output is their sum."""
    assert call.method == "encode" and call.signature is None
    states = call.kwargs["input_ids"][..., None].float() + 1
    return {"last_hidden_state": states, "pooler_output": states.sum(1)}[call.static["output"]]


class Config(StubConfig):
    """As one specification says, for each encoder."""

    def __init__(self, **spec: Any):
        super().__init__()
        object.__setattr__(self, "spec", {"max_length": 5, "output": "last_hidden_state", **spec})

    def encode_prompt_spec(self, index, batch):
        return PromptSpec(batch.params.prompt, batch.params.negative_prompt or "", **vars(self)["spec"])


def encoded(config, num_encoders=1, **fields):
    batch = request(**fields)
    batch.prompt_embeds = []
    stage = TextEncodingStage([Tokenizer()] * num_encoders, None, config)
    yielded = drive(stage, batch, encode)
    return batch, [(call.component, call.key.branch) for (call,) in yielded]


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ({}, [2, 4, 5, 1, 1]),
        ({"padding": "do_not_pad"}, [2, 4, 5]),
        ({"attention_mask": True}, [2, 4, 5, 1, 1]),
        ({"zero_padding": True}, [2, 4, 5, 0, 0]),
        ({"drop_prefix": 1, "max_embeds": 2}, [4, 5]),
        ({"output": "pooler_output"}, [2 + 4 + 5 + 1 + 1]),
    ],
)
def test_an_embedding_is_what_the_specification_says(spec, expected):
    batch, _ = encoded(Config(**spec), prompt="a ab")
    assert batch.prompt_embeds[0].flatten().tolist() == expected
    assert batch.negative_prompt_embeds == [] and batch.warnings == []


def test_every_encoder_encodes_and_each_encoding_is_a_call():
    batch, calls = encoded(Config(padding="do_not_pad"), 2, prompt="a", negative_prompt="ab ab", guidance_scale=2.0)
    assert [each.flatten().tolist() for each in batch.prompt_embeds] == [[2, 4]] * 2
    assert [each.flatten().tolist() for each in batch.negative_prompt_embeds] == [[2, 5, 5]] * 2
    names = ("text_encoder", "text_encoder_2")
    assert calls == [(name, branch) for name in names for branch in ("cond", "uncond")]


def test_a_text_that_is_cut_is_said():
    batch, _ = encoded(Config(), prompt="a b c d e f")
    assert batch.prompt_embeds[0].shape[1] == 5
    assert batch.warnings == ["prompt: 7 tokens were cut to the 5 that a text encoder takes"]


def test_encoders_have_the_names_of_the_index():
    assert [encoder_name(index) for index in range(3)] == ["text_encoder", "text_encoder_2", "text_encoder_3"]
