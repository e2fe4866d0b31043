"""Arguments of the operations as models give them, on which a fused form is checked before it is taken."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from safelight.layers import modulation, rotary

NUM_TOKENS, NUM_TEXT = 771, 77
"""Odd numbers: large enough that every part of a device works, small enough that a check takes milliseconds."""
EPS = 1e-6


@dataclass(frozen=True)
class RandomTensors:
    """Random tensors: activations in `dtype`, what steers them in `steering_dtype`; `gated`: whether sums have gates.

    They are drawn in one order, so that a check sees the same numbers each time.
    """

    generator: torch.Generator
    device: torch.device
    dtype: torch.dtype
    steering_dtype: torch.dtype
    batch: int
    num_groups: int
    gated: bool = True

    def values(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Return normal random numbers, rounded to a dtype."""
        drawn = torch.randn(shape, generator=self.generator)
        return drawn.to(self.device, dtype or self.dtype)

    def tokens(self, dim: int) -> Tensor:
        """Return [B, S, C] in the middle of a longer sequence, off centre, and with channels of unlike size."""
        rows = self.values(self.batch, NUM_TOKENS + 2, dim, dtype=torch.float32)
        return (rows * torch.linspace(0.2, 8.0, dim, device=self.device) + 0.5).to(self.dtype)[:, 1:-1]

    def steering(self, dim: int) -> tuple[Tensor, ...]:
        """Return three of [B, G, C], as they lie in one projection's result."""
        return self.values(self.batch, self.num_groups, 3 * dim, dtype=self.steering_dtype).chunk(3, dim=-1)

    def heads(self, num_tokens: int, num_heads: int, head_dim: int) -> Tensor:
        """Return [B, S, H, D]."""
        return 3 * self.values(self.batch, num_tokens, num_heads, head_dim)

    def rotations(self, num_tokens: int, head_dim: int) -> Tensor:
        """Return complex64 [S, D/2]."""
        angles = 100 * self.values(num_tokens, head_dim // 2, dtype=torch.float32)
        return torch.polar(torch.ones_like(angles), angles)

    def group_size(self) -> int | None:
        """Return the tokens of a group."""
        return None if self.num_groups == 1 else NUM_TOKENS // self.num_groups


def norm_modulate_example(random: RandomTensors, dim: int) -> tuple[Any, ...]:
    """Return arguments of `norm_modulate`."""
    scale, shift, _ = random.steering(dim)
    return random.tokens(dim), scale, shift, EPS, random.group_size()


def gated_residual_example(random: RandomTensors, dim: int) -> tuple[Any, ...]:
    """Return arguments of `gated_residual`."""
    return random.tokens(dim), random.steering(dim)[0], random.tokens(dim), random.group_size()


def residual_norm_example(random: RandomTensors, dim: int, affine: int) -> tuple[Any, ...]:
    """Return arguments of `residual_norm`; where the norm has weights, the sum has a gate."""
    gate, scale, shift = random.steering(dim)
    residual, update, group_size = random.tokens(dim), random.tokens(dim), random.group_size()
    if affine:
        weight, bias = (random.values(dim, dtype=random.steering_dtype) for _ in range(2))
        return residual, gate, update, weight, bias, None, None, EPS, group_size
    return residual, gate if random.gated else None, update, None, None, scale, shift, EPS, group_size


def qk_norm_rotary_example(random: RandomTensors, num_heads: int, head_dim: int, across_heads: int) -> tuple[Any, ...]:
    """Return arguments of `qk_norm_rotary`."""
    width = num_heads * head_dim if across_heads else head_dim
    query, key = (random.heads(NUM_TOKENS, num_heads, head_dim) for _ in range(2))
    weights = (1 + random.values(width) / 4 for _ in range(2))
    return query, key, *weights, random.rotations(NUM_TOKENS, head_dim), EPS


def joint_qk_norm_rotary_example(random: RandomTensors, num_heads: int, head_dim: int) -> tuple[Any, ...]:
    """Return arguments of `joint_qk_norm_rotary`."""
    text, image = (
        [random.heads(num_tokens, num_heads, head_dim) for _ in range(3)] for num_tokens in (NUM_TEXT, NUM_TOKENS)
    )
    weights = (1 + random.values(head_dim) / 4 for _ in range(4))
    return *text, *image, *weights, random.rotations(NUM_TEXT + NUM_TOKENS, head_dim), EPS


EXAMPLES: Mapping[Callable[..., Any], Callable[..., tuple[Any, ...]]] = {
    modulation.norm_modulate: norm_modulate_example,
    modulation.gated_residual: gated_residual_example,
    modulation.residual_norm: residual_norm_example,
    rotary.qk_norm_rotary: qk_norm_rotary_example,
    rotary.joint_qk_norm_rotary: joint_qk_norm_rotary_example,
}
"""For each operation in its plain form, what makes its arguments from random tensors and a layer's sizes."""


def examples(
    plain: Callable[..., Any], sizes: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[Any, ...]]:
    """Yield the arguments to check an operation on.

    One and two rows, one and three groups of tokens, what steers in the activations' dtype and in float32, and sums
    with gates and without, in every combination.

    Args:
        plain: the operation in its plain form.
        sizes: of the layer.
        dtype: of activations.
        device: where the arguments are.

    """
    generator = torch.Generator().manual_seed(0)
    for steering_dtype in sorted({dtype, torch.float32}, key=str):
        for batch, num_groups in ((1, 1), (2, 1), (1, 3), (2, 3)):
            for gated in (True, False) if plain is modulation.residual_norm else (True,):
                random = RandomTensors(generator, device, dtype, steering_dtype, batch, num_groups, gated)
                yield EXAMPLES[plain](random, *sizes)
