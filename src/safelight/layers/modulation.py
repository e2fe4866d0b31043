"""Adaptive layer norm (adaLN; Peebles & Xie, 2022, arXiv:2212.09748): norms steered by the timestep's embedding."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from safelight.layers.fusable import FusableLayer

FLOAT16_MAX = 65504.0


def modulate(normed: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Return `normed * (1 + scale) + shift`; [B, S, C] with [B, 1, C]."""
    return torch.addcmul(shift, normed, 1 + scale)


def per_token(vectors: Tensor, num_tokens: int, group_size: int | None) -> Tensor:
    """Return each token's vector, [B, S, C] of [B, G, C], or what broadcasts to it.

    Args:
        vectors: one for each group of tokens.
        num_tokens: S.
        group_size: tokens of a group; the last group has the rest. None where there is one group.

    """
    if group_size is None:
        return vectors
    groups = torch.arange(num_tokens, device=vectors.device) // group_size
    return vectors[:, groups.clamp(max=vectors.shape[1] - 1)]


def norm_modulate(
    hidden_states: Tensor, scale: Tensor, shift: Tensor, eps: float, group_size: int | None = None
) -> Tensor:
    """Return the layer norm of [B, S, C], modulated, computed in the dtype of `scale` and `shift`.

    Args:
        hidden_states: [B, S, C].
        scale, shift: [B, G, C], one vector for each group of tokens.
        eps: of the norm.
        group_size: as in `per_token`.

    """
    normed = F.layer_norm(hidden_states.to(scale.dtype), hidden_states.shape[-1:], None, None, eps)
    scale, shift = (per_token(vectors, hidden_states.shape[1], group_size) for vectors in (scale, shift))
    return modulate(normed, scale, shift).to(hidden_states.dtype)


def gated_residual(residual: Tensor, gate: Tensor, update: Tensor, group_size: int | None = None) -> Tensor:
    """Return `residual + gate * update`, computed in the dtype of `gate`.

    Args:
        residual, update: [B, S, C].
        gate: [B, G, C], one vector for each group of tokens.
        group_size: as in `per_token`.

    """
    gate = per_token(gate, residual.shape[1], group_size)
    return torch.addcmul(residual.to(gate.dtype), gate, update.to(gate.dtype)).to(residual.dtype)


def residual_norm(
    residual: Tensor,
    gate: Tensor | None,
    update: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    eps: float,
    group_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the residual with its update, and its norm: either modulated, or with learned weights.

    The norm reads the sum as it is returned, rounded to its dtype.

    Args:
        residual, update: [B, S, C].
        gate: [B, G, C], or None for a plain sum.
        weight, bias: [C], of the norm; None where `scale` and `shift` steer it.
        scale, shift: [B, G, C], or None.
        eps: of the norm.
        group_size: as in `per_token`.

    """
    total = residual + update if gate is None else gated_residual(residual, gate, update, group_size)
    if scale is not None and shift is not None:
        return total, norm_modulate(total, scale, shift, eps, group_size)
    assert weight is not None, "a norm is modulated, or has weights"
    return total, F.layer_norm(total.to(weight.dtype), weight.shape, weight, bias, eps).to(total.dtype)


def clip_float16(hidden_states: Tensor) -> Tensor:
    """Keep float16 activations finite, as the reference does; other dtypes are returned as they are."""
    if hidden_states.dtype is torch.float16:
        return hidden_states.clip(-FLOAT16_MAX, FLOAT16_MAX)
    return hidden_states


class NormModulate(FusableLayer):
    """A layer norm without weights, steered by a scale and a shift.

    Args:
        dim: channels.
        eps: of the norm.

    """

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__(norm_modulate, (dim,))
        self.eps = eps

    def forward(self, hidden_states: Tensor, scale: Tensor, shift: Tensor, group_size: int | None = None) -> Tensor:
        """Return [B, S, C]; arguments as in `norm_modulate`."""
        normed: Tensor = self.operation(hidden_states, scale, shift, self.eps, group_size)
        return normed


class GatedResidual(FusableLayer):
    """The end of a branch: its update is added through a gate.

    Args:
        dim: channels.

    """

    def __init__(self, dim: int) -> None:
        super().__init__(gated_residual, (dim,))

    def forward(self, residual: Tensor, gate: Tensor, update: Tensor, group_size: int | None = None) -> Tensor:
        """Return [B, S, C]; arguments as in `gated_residual`."""
        total: Tensor = self.operation(residual, gate, update, group_size)
        return total


class ResidualNorm(FusableLayer):
    """The end of a branch and the norm before the next.

    Args:
        dim: channels.
        eps: of the norm.
        elementwise_affine: whether the norm has weights; it is modulated otherwise.

    """

    def __init__(self, dim: int, eps: float = 1e-6, elementwise_affine: bool = False) -> None:
        super().__init__(residual_norm, (dim, int(elementwise_affine)))
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim)) if elementwise_affine else None
        self.bias = nn.Parameter(torch.zeros(dim)) if elementwise_affine else None

    def forward(
        self,
        residual: Tensor,
        gate: Tensor | None,
        update: Tensor,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        group_size: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the sum and its norm, each [B, S, C]; arguments as in `residual_norm`."""
        total, normed = self.operation(
            residual, gate, update, self.weight, self.bias, scale, shift, self.eps, group_size
        )
        return total, normed


class GivenModulation(nn.Module):
    """A norm that the first two of some vectors steer, which are made elsewhere: it has no weights.

    The first vector shifts and the second scales, as in the checkpoints of blocks.

    Args:
        dim: channels.
        num_chunks: vectors that it is given.

    """

    def __init__(self, dim: int, num_chunks: int) -> None:
        super().__init__()
        self.num_chunks = num_chunks
        self.norm = NormModulate(dim)

    def forward(self, hidden_states: Tensor, temb: Tensor) -> tuple[Tensor, ...]:
        """Return the modulated norm of [B, S, C], then the other vectors, each [B, 1, C], of temb [B, K, C]."""
        shift, scale, *others = temb.chunk(self.num_chunks, dim=1)
        return (self.norm(hidden_states, scale, shift), *others)


class Modulation(GivenModulation):
    """As `GivenModulation`, of scales, shifts and gates that it makes from the conditioning vector.

    Args:
        dim: channels.
        num_chunks: vectors of `dim` channels to make.

    """

    def __init__(self, dim: int, num_chunks: int) -> None:
        super().__init__(dim, num_chunks)
        self.silu = nn.SiLU()
        self.linear = nn.Linear(dim, num_chunks * dim)

    def forward(self, hidden_states: Tensor, temb: Tensor) -> tuple[Tensor, ...]:
        """Return the modulated norm of [B, S, C], then the other chunks, each [B, 1, C]."""
        return super().forward(hidden_states, self.linear(self.silu(temb)).unflatten(-1, (self.num_chunks, -1)))


class ModulatedNorm(nn.Module):
    """The norm before the last layer: scale first, then shift, as in the checkpoints.

    Args:
        dim: channels.

    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.silu = nn.SiLU()
        self.linear = nn.Linear(dim, 2 * dim)
        self.norm = NormModulate(dim)

    def forward(self, hidden_states: Tensor, temb: Tensor) -> Tensor:
        """Return [B, S, C]."""
        scale, shift = self.linear(self.silu(temb))[:, None].chunk(2, dim=-1)
        normed: Tensor = self.norm(hidden_states, scale, shift)
        return normed
