"""Blocks with two streams and with one, against Diffusers' own with the same parameters."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock, FluxTransformerBlock
from torch import nn

from safelight.attention import AttentionMetadata
from safelight.layers.rotary import rotary_table
from safelight.layers.stream_blocks import DoubleStreamBlock, SingleStreamBlock, blocks_tp_plan

DIM, HEADS, TEXT, IMAGE = 32, 2, 5, 12


def pair(ours, reference, seed):
    torch.manual_seed(seed)
    for name, parameter in reference.named_parameters():
        nn.init.normal_(parameter, 1.0 if "attn.norm" in name else 0.0, 0.3)
    ours.load_state_dict(reference.state_dict())
    return ours.eval(), reference.eval()


def inputs():
    places = torch.arange(TEXT + IMAGE)
    table = rotary_table(torch.stack([places, places % 4, places], 1), (4, 6, 6))
    halves = [part.repeat_interleave(2, -1).float() for part in (table.real, table.imag)]
    return torch.randn(2, IMAGE, DIM), torch.randn(2, TEXT, DIM), torch.randn(2, DIM), table, tuple(halves)


@pytest.mark.parametrize("seed", range(2))
def test_two_streams(seed):
    ours, reference = pair(
        DoubleStreamBlock(DIM, HEADS, DIM // HEADS), FluxTransformerBlock(DIM, HEADS, DIM // HEADS), seed
    )
    image, text, temb, table, halves = inputs()
    with torch.inference_mode():
        expected_text, expected = reference(image, text, temb, halves)
        made, made_text = ours(image, text, temb, temb, table)
    assert torch.allclose(made, expected, atol=1e-4) and torch.allclose(made_text, expected_text, atol=1e-4)


@pytest.mark.parametrize("seed", range(2))
def test_one_stream(seed):
    ours, reference = pair(
        SingleStreamBlock(DIM, HEADS, DIM // HEADS), FluxSingleTransformerBlock(DIM, HEADS, DIM // HEADS), seed
    )
    image, text, temb, table, halves = inputs()
    with torch.inference_mode():
        expected = torch.cat(reference(image, text, temb, halves), dim=1)
        made = ours(torch.cat((text, image), dim=1), temb, table)
        hidden = torch.ones(2, 1, 1, TEXT + IMAGE, dtype=torch.bool)
        hidden[..., 1:TEXT] = False
        masked = ours(torch.cat((text, image), dim=1), temb, table, AttentionMetadata(hidden))
    assert torch.allclose(made, expected, atol=1e-4)
    assert not torch.allclose(masked[:, TEXT:], made[:, TEXT:], atol=1e-3), "text that is not seen matters"


def test_the_plan_names_layers_that_are_there():
    names = {f"transformer_blocks.*.{name}" for name, _ in DoubleStreamBlock(DIM, HEADS, 16).named_modules()}
    names |= {f"single_transformer_blocks.*.{name}" for name, _ in SingleStreamBlock(DIM, HEADS, 16).named_modules()}
    assert blocks_tp_plan().keys() <= names
