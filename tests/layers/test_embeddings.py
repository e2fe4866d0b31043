"""Embeddings against Diffusers' own."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.embeddings import (
    PixArtAlphaTextProjection,
    TimestepEmbedding,
    get_timestep_embedding,
)

from safelight.layers.embeddings import EmbeddingMLP, timestep_embedding
from tests.layers.comparisons import close, with_weights_of


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
