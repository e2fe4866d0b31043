"""Modulated norms and gates against Diffusers' own."""

from __future__ import annotations

import torch
from diffusers.models.normalization import AdaLayerNormContinuous, AdaLayerNormZero, AdaLayerNormZeroSingle

from safelight.layers.modulation import ModulatedNorm, Modulation, gated_residual, modulate
from tests.layers.comparisons import close, with_weights_of


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
