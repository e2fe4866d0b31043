"""Shared layers against Diffusers' own."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.attention import FeedForward as ReferenceFeedForward
from diffusers.models.embeddings import (
    PixArtAlphaTextProjection,
    TimestepEmbedding,
    get_1d_rotary_pos_embed,
    get_timestep_embedding,
)
from diffusers.models.embeddings import (
    apply_rotary_emb as reference_apply,
)
from diffusers.models.normalization import AdaLayerNormContinuous, AdaLayerNormZero, AdaLayerNormZeroSingle
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from safelight.layers import convolution
from safelight.layers.convolution import add_conv, conv_in_place
from safelight.layers.embeddings import EmbeddingMLP, timestep_embedding
from safelight.layers.linear import FeedForward
from safelight.layers.modulation import ModulatedNorm, Modulation, gated_residual, modulate
from safelight.layers.rotary import apply_rotary_emb, rotary_table
from safelight.testing.recipes import shake


def with_weights_of(reference: nn.Module, ours: nn.Module) -> nn.Module:
    ours.load_state_dict(shake(reference, 0).state_dict(), strict=True)
    return ours


def close(left, right, atol=1e-5):
    torch.testing.assert_close(left, right, atol=atol, rtol=0)


@pytest.mark.parametrize("axes", [(8,), (4, 6, 6), (16, 56, 56)])
def test_rotary(axes):
    ids = torch.randint(0, 300, (21, len(axes))).float()
    table = rotary_table(ids, axes)
    pairs = [
        get_1d_rotary_pos_embed(
            dim, ids[:, axis], repeat_interleave_real=True, use_real=True, freqs_dtype=torch.float64
        )
        for axis, dim in enumerate(axes)
    ]
    cos, sin = (torch.cat(tables, dim=-1) for tables in zip(*pairs, strict=True))
    assert torch.equal(table.real.repeat_interleave(2, 1), cos) and torch.equal(table.imag.repeat_interleave(2, 1), sin)
    for dtype, atol in ((torch.float32, 1e-6), (torch.bfloat16, 2e-2)):
        states = torch.randn(2, 21, 3, sum(axes)).to(dtype)
        turned = apply_rotary_emb(states, table)
        assert turned.dtype == dtype
        close(turned, reference_apply(states, (cos, sin), sequence_dim=1), atol)


@pytest.mark.parametrize("timesteps", [[0.0, 1.0, 999.5], [1000.0], [3500.0, 0.25]])
def test_timestep_embedding(timesteps):
    given = torch.tensor(timesteps)
    reference = get_timestep_embedding(given, 256, flip_sin_to_cos=True, downscale_freq_shift=0)
    assert torch.equal(timestep_embedding(given, 256), reference)


def test_embedding_mlps():
    vector = torch.randn(3, 256)
    reference = TimestepEmbedding(256, 32)
    close(with_weights_of(reference, EmbeddingMLP(256, 32))(vector), reference(vector))
    text = PixArtAlphaTextProjection(256, 48, act_fn="silu")
    close(with_weights_of(text, EmbeddingMLP(256, 48))(vector), text(vector))


def test_feed_forward():
    reference = ReferenceFeedForward(24, dim_out=24, activation_fn="gelu-approximate")
    states = torch.randn(2, 5, 24)
    close(with_weights_of(reference, FeedForward(24))(states), reference(states))


def test_modulation():
    states, temb = torch.randn(2, 5, 24), torch.randn(2, 24)
    six = AdaLayerNormZero(24)
    normed, *chunks = with_weights_of(six, Modulation(24, 6))(states, temb)
    expected, gate, shift, scale, gate_mlp = six(states, emb=temb)
    close(normed, expected)
    for ours, theirs in zip(chunks, (gate, shift, scale, gate_mlp), strict=True):
        close(ours[:, 0], theirs)
    three = AdaLayerNormZeroSingle(24)
    normed, gate_single = with_weights_of(three, Modulation(24, 3))(states, temb)
    close(normed, three(states, emb=temb)[0])
    close(gate_single[:, 0], three(states, emb=temb)[1])
    close(gated_residual(states, chunks[0], normed), states + gate[:, None] * normed)
    close(modulate(states, chunks[2], chunks[1]), states * (1 + scale[:, None]) + shift[:, None])


def test_last_norm():
    states, temb = torch.randn(2, 5, 24), torch.randn(2, 24)
    reference = AdaLayerNormContinuous(24, 24, elementwise_affine=False, eps=1e-6)
    close(with_weights_of(reference, ModulatedNorm(24))(states, temb), reference(states, temb))


class CountedOperations(TorchDispatchMode):
    """Counts operations that compute."""

    def __init__(self):
        super().__init__()
        self.num_convolutions = self.num_others = 0
        self.others = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "convolution" in str(func):
            self.num_convolutions += 1
        elif not func.is_view:
            self.num_others += 1
            self.others.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("height", [1, 7, 64, 65, 200])
def test_bands_of_a_convolution_are_the_whole(height, monkeypatch):
    generator = torch.Generator().manual_seed(height)
    frame = torch.randn(1, 6, height, 9, generator=generator)
    weight = torch.randn(6, 6, 3, 3, generator=generator)
    for rows in (2, 64):
        monkeypatch.setattr(convolution, "BAND_ROWS", rows)
        expected = nn.functional.conv2d(frame, weight, padding=1)
        torch.testing.assert_close(conv_in_place(frame.clone(), weight), expected, atol=1e-5, rtol=1e-5)
        added = torch.ones_like(frame)
        add_conv(added, frame, weight)
        torch.testing.assert_close(added, expected + 1, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("height", [60, 480, 720])
def test_on_another_device_than_a_cpu_a_convolution_is_one(height):
    """Launches cost more than memory there."""
    frame, weight = torch.empty(1, 96, height, 832, device="meta"), torch.empty(96, 96, 3, 3, device="meta")
    with CountedOperations() as counted:
        add_conv(torch.empty_like(frame), frame, weight)
        conv_in_place(frame, weight)
    assert counted.num_convolutions == 2 and counted.num_others <= 2, counted.others
