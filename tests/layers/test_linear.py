"""Feed-forward layers against Diffusers' own."""

from __future__ import annotations

import torch
from diffusers.models.attention import FeedForward as ReferenceFeedForward

from safelight.layers.linear import FeedForward
from tests.layers.comparisons import close, with_weights_of


def test_feed_forward():
    reference = ReferenceFeedForward(24, dim_out=24, activation_fn="gelu-approximate")
    states = torch.randn(2, 5, 24)
    close(with_weights_of(reference, FeedForward(24))(states), reference(states))
