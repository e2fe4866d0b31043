"""A model's conventions: what they are unless a family says otherwise, and checks that families share."""

from __future__ import annotations

import pytest
import torch

from safelight.core.config import COND, UNCOND, check_field, check_rotary, per_channel
from safelight.errors import ModelIndexError
from tests.stages.stubs import StubConfig, request


def test_a_number_or_one_a_channel_broadcasts_over_latents():
    like = torch.zeros(1, 2, 3, 4, 5, dtype=torch.bfloat16)
    assert per_channel(2.0, like).shape == (1, 1, 1, 1, 1)
    made = per_channel((1.0, 2.0), like)
    assert made.shape == (1, 2, 1, 1, 1) and made.dtype == torch.bfloat16
    scale, shift = StubConfig(vae_scale=(2.0, 4.0), vae_shift=(0.5, 1.0)).get_decode_scale_and_shift(like)
    assert (scale.flatten().tolist(), shift.flatten().tolist()) == ([2.0, 4.0], [0.5, 1.0])


def test_branches_and_their_arguments_are_in_one_order():
    config, plain, guided = StubConfig(), request(), request(negative_prompt="y", guidance_scale=3.0)
    assert config.branches(plain) == (COND,) and config.branches(guided) == (COND, UNCOND)
    latents, t = torch.ones(1), torch.tensor(5.0)
    given = [config.prepare_branch_kwargs(branch, guided, latents, t)["x"].item() for branch in config.branches(guided)]
    assert given == [1.0, -1.0]
    assert config.combine_guidance(guided, [torch.tensor(2.0), torch.tensor(1.0)], t) == 1 + 3.0 * (2 - 1)
    assert config.combine_guidance(plain, [torch.tensor(2.0)], t) == 2.0


def test_calls_are_stacked_where_sizes_agree():
    """The picture's two sides, the text's length and the images; never a scale."""
    config, one, other = StubConfig(), request(guidance_scale=1.0), request(guidance_scale=9.0)
    one.raw_latent_shape = other.raw_latent_shape = (1, 2, 4, 2)
    assert config.call_signature(COND, one) == config.call_signature(COND, other)
    one.raw_latent_shape = (1, 2, 2, 4)
    assert config.call_signature(COND, one) != config.call_signature(COND, other)
    one.raw_latent_shape, one.prompt_embeds = (1, 2, 4, 2), [torch.ones(1, 4, 5)]
    assert config.call_signature(COND, one) != config.call_signature(COND, other)
    one.prompt_embeds, one.image_latents = other.prompt_embeds, [torch.ones(1, 2, 4, 2)]
    assert config.call_signature(COND, one) != config.call_signature(COND, other)


def test_a_setting_that_does_not_fit_the_rest_is_named():
    check_field("transformer", "patch_size", 2, (1, 2))
    with pytest.raises(ModelIndexError, match=r"transformer/config.json: patch_size: got 3; .* it takes 1 or 2"):
        check_field("transformer", "patch_size", 3, (1, 2))
    check_rotary("transformer", (2, 4, 4), 3, 10)
    for axes, words in (((2, 8), "their number"), ((2, 4, 6), "their sum"), ((3, 3, 4), "odd ones")):
        with pytest.raises(ModelIndexError, match=words):
            check_rotary("transformer", axes, 3, 10)
