"""Attention over text and picture together, each with projections and norms of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from safelight.attention import Attention, AttentionMetadata
from safelight.layers.rotary import JointQKNormRotary

UNMASKED = AttentionMetadata()


class JointAttention(nn.Module):
    """Joint attention with the parameter names of Diffusers' `Attention`; text stands first.

    Args:
        dim: channels of text and picture.
        num_heads: of attention.
        head_dim: channels of a head.

    """

    tp_plan: ClassVar[Mapping[str, str]] = {
        "to_q": "column",
        "to_k": "column",
        "to_v": "column",
        "to_out.0": "row",
        "add_q_proj": "column",
        "add_k_proj": "column",
        "add_v_proj": "column",
        "to_add_out": "row",
    }
    """Its part of a model's tensor-parallel plan."""

    def __init__(self, dim: int, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.to_q = nn.Linear(dim, dim)
        self.to_k = nn.Linear(dim, dim)
        self.to_v = nn.Linear(dim, dim)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])
        self.norm_q = nn.RMSNorm(head_dim, eps=1e-6)
        self.norm_k = nn.RMSNorm(head_dim, eps=1e-6)
        self.add_q_proj = nn.Linear(dim, dim)
        self.add_k_proj = nn.Linear(dim, dim)
        self.add_v_proj = nn.Linear(dim, dim)
        self.to_add_out = nn.Linear(dim, dim)
        self.norm_added_q = nn.RMSNorm(head_dim, eps=1e-6)
        self.norm_added_k = nn.RMSNorm(head_dim, eps=1e-6)
        self.rotary = JointQKNormRotary(num_heads, head_dim)
        self.attention = Attention(num_heads, head_dim)

    def forward(
        self, image: Tensor, text: Tensor, freqs_cis: Tensor, metadata: AttentionMetadata = UNMASKED
    ) -> tuple[Tensor, Tensor]:
        """Return the updates of image [B, S_image, C] and text [B, S_text, C].

        Args:
            image: [B, S_image, C].
            text: [B, S_text, C].
            freqs_cis: complex64 [S_text + S_image, D/2].
            metadata: of attention: a mask of the keys, text first.

        """
        text_heads = [self.heads(linear(text)) for linear in (self.add_q_proj, self.add_k_proj, self.add_v_proj)]
        image_heads = [self.heads(linear(image)) for linear in (self.to_q, self.to_k, self.to_v)]
        norms = (self.norm_added_q.weight, self.norm_added_k.weight, self.norm_q.weight, self.norm_k.weight)
        query, key, value = self.rotary(text_heads, image_heads, norms, freqs_cis)
        attended = self.attention(query, key, value, metadata).flatten(2)
        text_update, image_update = torch.split(attended, [text.shape[1], image.shape[1]], dim=1)
        return self.to_out[0](image_update), self.to_add_out(text_update)

    def heads(self, projected: Tensor) -> Tensor:
        """Return [B, S, H, D] of [B, S, C]."""
        return projected.view(*projected.shape[:-1], -1, self.head_dim)
