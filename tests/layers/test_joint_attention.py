"""Attention over text and picture together, against Diffusers' own with the same parameters."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.transformers.transformer_flux import FluxAttention
from torch import nn

from safelight.attention import AttentionMetadata
from safelight.layers.joint_attention import JointAttention
from safelight.layers.rotary import rotary_table

DIM, HEADS, TEXT, IMAGE = 32, 2, 5, 12
AXES = (4, 6, 6)


@pytest.fixture(params=[0, 1])
def pair(request):
    torch.manual_seed(request.param)
    reference = FluxAttention(
        query_dim=DIM, heads=HEADS, dim_head=DIM // HEADS, added_kv_proj_dim=DIM, out_dim=DIM, bias=True, eps=1e-6
    ).eval()
    for name, parameter in reference.named_parameters():
        nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.4)
    ours = JointAttention(DIM, HEADS, DIM // HEADS).eval()
    state = {name: tensor for name, tensor in reference.state_dict().items() if not name.startswith("to_out.1")}
    ours.load_state_dict(state)
    return ours, reference


def inputs():
    positions = torch.stack([torch.arange(TEXT + IMAGE), torch.arange(TEXT + IMAGE) % 4, torch.arange(TEXT + IMAGE)], 1)
    return torch.randn(2, IMAGE, DIM), torch.randn(2, TEXT, DIM), rotary_table(positions, AXES)


def test_it_is_the_references(pair):
    ours, reference = pair
    image, text, table = inputs()
    cosine, sine = table.real.repeat_interleave(2, -1).float(), table.imag.repeat_interleave(2, -1).float()
    with torch.inference_mode():
        expected = reference(image, encoder_hidden_states=text, image_rotary_emb=(cosine, sine))
        made = ours(image, text, table)
    assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(made, expected, strict=True))


def test_a_mask_hides_text(pair):
    """Masked text changes nothing; unmasked it does."""
    ours, _ = pair
    image, text, table = inputs()
    other = text.clone()
    other[:, -2:] += 1
    seen = torch.ones(2, 1, 1, TEXT + IMAGE, dtype=torch.bool)
    seen[..., TEXT - 2 : TEXT] = False
    with torch.inference_mode():
        hidden = [ours(image, each, table, AttentionMetadata(seen))[0] for each in (text, other)]
        shown = [ours(image, each, table)[0] for each in (text, other)]
    assert torch.allclose(hidden[0], hidden[1], atol=1e-6) and not torch.allclose(shown[0], shown[1], atol=1e-3)
