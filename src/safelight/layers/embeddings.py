"""Embeddings of timesteps, guidance scales and pooled text."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def timestep_embedding(timesteps: Tensor, dim: int, max_period: float = 10_000.0) -> Tensor:
    """Return sinusoids, cosines first, float32 [B, dim] (Ho et al., 2020, arXiv:2006.11239).

    Args:
        timesteps: [B], any range.
        dim: channels, an even number.
        max_period: the longest period, in units of `timesteps`.

    """
    half = dim // 2
    frequencies = torch.exp(
        -math.log(max_period) * torch.arange(half, dtype=torch.float32, device=timesteps.device) / half
    )
    angles = timesteps[:, None].float() * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


class EmbeddingMLP(nn.Module):
    """Two linear layers with an activation between, SiLU unless given; [..., in_dim] to [..., dim]."""

    def __init__(self, in_dim: int, dim: int, activation: nn.Module | None = None) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_dim, dim)
        self.act = activation or nn.SiLU()
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return [..., dim]."""
        embedded: Tensor = self.linear_2(self.act(self.linear_1(hidden_states)))
        return embedded
