"""Which text embeddings are of padding is kept beside them, whatever the encoder was told, and through the cache."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from safelight import ServerArgs
from safelight.core.executor import Execution
from safelight.loading.loader import load_pipeline
from safelight.testing.models import requests
from tests.recipes import all_recipes

SMALL = {"prompt": "a cat", "num_inference_steps": 2, "max_sequence_length": 24}


def encoded(pipeline, fields):
    """Return a request when its conditions are made."""
    (req,) = requests(pipeline, {**SMALL, **fields})
    with Execution(pipeline, req) as execution:
        while req.cond is None:
            execution.advance()
    return req


def num_tokens(pipeline, text, name="tokenizer"):
    return len(pipeline.get_module(name)(text).input_ids)


@pytest.mark.parametrize("zeroes", [True, False])
def test_padding_is_masked_and_zeroed_only_where_that_is_asked_for(tiny_models, monkeypatch, zeroes):
    pipeline = tiny_models.ours(all_recipes()["WanPipeline"])
    config, spec = type(pipeline.config), type(pipeline.config).encode_prompt_spec
    monkeypatch.setattr(
        config, "encode_prompt_spec", lambda *args: replace(spec(*args), zero_padding=zeroes, attention_mask=True)
    )
    size = {"height": 32, "width": 32, "num_frames": 1, "negative_prompt": "a blurry dog"}
    req = encoded(pipeline, size)
    for text, embeds, masks in (
        ("a cat", req.prompt_embeds, req.prompt_embeds_mask),
        ("a blurry dog", req.negative_prompt_embeds, req.negative_prompt_embeds_mask),
    ):
        ((mask,), (embed,)) = masks, embeds
        count = num_tokens(pipeline, text)
        assert mask.dtype == torch.bool and mask.tolist() == [[True] * count + [False] * (24 - count)]
        assert embed.shape[:2] == mask.shape and embed[mask].count_nonzero(dim=-1).all()
        assert bool(embed[~mask].any()) is not zeroes


def test_a_mask_is_kept_of_an_encoder_that_is_not_told_of_it(tiny_models):
    """CLIP's pooled embedding has none, and T5's has that of its tokenizer."""
    recipe = all_recipes()["FluxPipeline"]
    caching = load_pipeline(ServerArgs(str(tiny_models.folder(recipe)), device="cpu"))
    made, kept = (encoded(caching, {"height": 32, "width": 32}) for _ in range(2))
    assert caching.conditioning_cache.num_hits == 2
    count = num_tokens(caching, "a cat", "tokenizer_2")
    for req in (made, kept):
        pooled, mask = req.prompt_embeds_mask
        assert pooled is None and mask.tolist() == [[True] * count + [False] * (24 - count)]
        assert req.negative_prompt_embeds_mask == []


def test_a_mask_is_cut_as_its_embeddings_are(tiny_models):
    """Where a template is dropped, and tokens after `max_sequence_length`."""
    pipeline = tiny_models.ours(all_recipes()["QwenImagePipeline"])
    req = encoded(pipeline, {"height": 32, "width": 32, "max_sequence_length": 5})
    assert req.prompt_embeds[0].shape[1] == 5 and req.prompt_embeds_mask[0].tolist() == [[True] * 5]
