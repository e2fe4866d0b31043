"""Blocks of transformers over text and picture: with two streams that attend together, and with one.

The blocks are named as their authors, Black Forest Labs, name them; their parameters as Diffusers does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from safelight.attention import Attention, AttentionMetadata
from safelight.layers.joint_attention import UNMASKED, JointAttention
from safelight.layers.linear import FeedForward
from safelight.layers.modulation import GatedResidual, Modulation, ResidualNorm, clip_float16
from safelight.layers.rotary import QKNormRotary

ModulationClass = Callable[[int, int], nn.Module]
"""Makes what norms and steers a block's input, of its channels and the number of vectors: `Modulation`, or another."""


class SelfAttention(nn.Module):
    """Attention of the blocks with one stream; its output goes into the block's joint projection."""

    def __init__(self, dim: int, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.norm_q = nn.RMSNorm(head_dim, eps=1e-6)
        self.norm_k = nn.RMSNorm(head_dim, eps=1e-6)
        self.to_q = nn.Linear(dim, dim)
        self.to_k = nn.Linear(dim, dim)
        self.to_v = nn.Linear(dim, dim)
        self.rotary = QKNormRotary(num_heads, head_dim)
        self.attention = Attention(num_heads, head_dim)

    def forward(self, hidden_states: Tensor, freqs_cis: Tensor, metadata: AttentionMetadata = UNMASKED) -> Tensor:
        """Return [B, S, C]."""
        query, key, value = (
            linear(hidden_states).unflatten(-1, (-1, self.head_dim)) for linear in (self.to_q, self.to_k, self.to_v)
        )
        query, key = self.rotary(query, key, self.norm_q.weight, self.norm_k.weight, freqs_cis)
        attended: Tensor = self.attention(query, key, value, metadata)
        return attended.flatten(2)


class DoubleStreamBlock(nn.Module):
    """A block with two streams.

    Args:
        dim: channels.
        num_heads, head_dim: of attention.
        modulation: makes what steers each stream: six vectors.

    """

    tp_plan: ClassVar[Mapping[str, str]] = {
        "norm1.linear": "column, gathered",
        "norm1_context.linear": "column, gathered",
        **{f"attn.{name}": way for name, way in JointAttention.tp_plan.items()},
        "ff.net.0.proj": "column",
        "ff.net.2": "row",
        "ff_context.net.0.proj": "column",
        "ff_context.net.2": "row",
    }
    """Its part of a model's tensor-parallel plan, where `Modulation` steers it."""

    def __init__(self, dim: int, num_heads: int, head_dim: int, modulation: ModulationClass = Modulation) -> None:
        super().__init__()
        self.norm1 = modulation(dim, 6)
        self.norm1_context = modulation(dim, 6)
        self.attn = JointAttention(dim, num_heads, head_dim)
        self.norm2 = ResidualNorm(dim)
        self.ff = FeedForward(dim)
        self.norm2_context = ResidualNorm(dim)
        self.ff_context = FeedForward(dim)
        self.residual = GatedResidual(dim)

    def forward(
        self,
        image: Tensor,
        text: Tensor,
        temb: Tensor,
        text_temb: Tensor,
        freqs_cis: Tensor,
        metadata: AttentionMetadata = UNMASKED,
    ) -> tuple[Tensor, Tensor]:
        """Return image [B, S_image, C] and text [B, S_text, C].

        Args:
            image: [B, S_image, C].
            text: [B, S_text, C].
            temb, text_temb: what the modulation of each stream takes.
            freqs_cis: complex64 [S_text + S_image, D/2].
            metadata: of attention, text first.

        """
        normed, gate, mlp_shift, mlp_scale, mlp_gate = self.norm1(image, temb)
        text_normed, text_gate, text_mlp_shift, text_mlp_scale, text_mlp_gate = self.norm1_context(text, text_temb)
        update, text_update = self.attn(normed, text_normed, freqs_cis, metadata)
        image, normed = self.norm2(image, gate, update, mlp_scale, mlp_shift)
        text, text_normed = self.norm2_context(text, text_gate, text_update, text_mlp_scale, text_mlp_shift)
        image = self.residual(image, mlp_gate, self.ff(normed))
        return image, clip_float16(self.residual(text, text_mlp_gate, self.ff_context(text_normed)))


class SingleStreamBlock(nn.Module):
    """A block with one stream; attention and MLP run side by side.

    Args:
        dim: channels.
        num_heads, head_dim: of attention.
        modulation: makes what steers it: three vectors.

    """

    tp_plan: ClassVar[Mapping[str, str]] = {
        "norm.linear": "column, gathered",
        "attn.to_q": "column",
        "attn.to_k": "column",
        "attn.to_v": "column",
        "proj_mlp": "column",
        "proj_out": "row of 1:4",  # attention beside the MLP
    }
    """Its part of a model's tensor-parallel plan, where `Modulation` steers it."""

    def __init__(self, dim: int, num_heads: int, head_dim: int, modulation: ModulationClass = Modulation) -> None:
        super().__init__()
        self.norm = modulation(dim, 3)
        self.proj_mlp = nn.Linear(dim, 4 * dim)
        self.act_mlp = nn.GELU(approximate="tanh")
        self.proj_out = nn.Linear(5 * dim, dim)
        self.attn = SelfAttention(dim, num_heads, head_dim)
        self.residual = GatedResidual(dim)

    def forward(
        self, hidden_states: Tensor, temb: Tensor, freqs_cis: Tensor, metadata: AttentionMetadata = UNMASKED
    ) -> Tensor:
        """Return [B, S_text + S_image, C]."""
        normed, gate = self.norm(hidden_states, temb)
        attended = self.attn(normed, freqs_cis, metadata)
        joined = torch.cat((attended, self.act_mlp(self.proj_mlp(normed))), dim=-1)
        return clip_float16(self.residual(hidden_states, gate, self.proj_out(joined)))


def blocks_tp_plan() -> dict[str, str]:
    """Return the part of a model's tensor-parallel plan of `transformer_blocks` and `single_transformer_blocks`."""
    return {
        **{f"transformer_blocks.*.{name}": way for name, way in DoubleStreamBlock.tp_plan.items()},
        **{f"single_transformer_blocks.*.{name}": way for name, way in SingleStreamBlock.tp_plan.items()},
    }
