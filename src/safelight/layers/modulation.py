"""Adaptive layer norm (adaLN; Peebles & Xie, 2022, arXiv:2212.09748): norms steered by the timestep's embedding."""

from __future__ import annotations

import torch
from torch import Tensor, nn

FLOAT16_MAX = 65504.0


def modulate(normed: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Return `normed * (1 + scale) + shift`; [B, S, C] with [B, 1, C]."""
    return torch.addcmul(shift, normed, 1 + scale)


def gated_residual(residual: Tensor, gate: Tensor, update: Tensor) -> Tensor:
    """Return `residual + gate * update`; [B, S, C] with gate [B, 1, C]."""
    return torch.addcmul(residual, gate, update)


def clip_float16(hidden_states: Tensor) -> Tensor:
    """Keep float16 activations finite, as the reference does; other dtypes are returned as they are."""
    if hidden_states.dtype is torch.float16:
        return hidden_states.clip(-FLOAT16_MAX, FLOAT16_MAX)
    return hidden_states


class Modulation(nn.Module):
    """Scales, shifts and gates from the conditioning vector, and the norm that the first two steer.

    The first chunk shifts and the second scales, as in the checkpoints of blocks.

    Args:
        dim: channels.
        num_chunks: vectors of `dim` channels to make.

    """

    def __init__(self, dim: int, num_chunks: int) -> None:
        super().__init__()
        self.num_chunks = num_chunks
        self.silu = nn.SiLU()
        self.linear = nn.Linear(dim, num_chunks * dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)

    def forward(self, hidden_states: Tensor, temb: Tensor) -> tuple[Tensor, ...]:
        """Return the modulated norm of [B, S, C], then the other chunks, each [B, 1, C]."""
        chunks = self.linear(self.silu(temb))[:, None].chunk(self.num_chunks, dim=-1)
        shift, scale, *others = chunks
        return (modulate(self.norm(hidden_states), scale, shift), *others)


class ModulatedNorm(nn.Module):
    """The norm before the last layer: scale first, then shift, as in the checkpoints.

    Args:
        dim: channels.

    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.silu = nn.SiLU()
        self.linear = nn.Linear(dim, 2 * dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)

    def forward(self, hidden_states: Tensor, temb: Tensor) -> Tensor:
        """Return [B, S, C]."""
        scale, shift = self.linear(self.silu(temb))[:, None].chunk(2, dim=-1)
        return modulate(self.norm(hidden_states), scale, shift)
