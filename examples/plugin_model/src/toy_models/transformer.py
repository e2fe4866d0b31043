"""A transformer of a few lines: text and picture in one sequence, steered by the timestep."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from safelight.attention import Attention
from safelight.layers.embeddings import EmbeddingMLP, timestep_embedding
from safelight.layers.linear import FeedForward
from safelight.layers.modulation import ModulatedNorm, Modulation, gated_residual
from safelight.layers.rotary import apply_rotary_emb

TIME_CHANNELS = 64


@dataclass(frozen=True)
class ToyArchitecture:
    """The numbers of `transformer/config.json`.

    Attributes:
        in_channels: of a token of latents.
        text_dim: channels of the text embeddings.
        num_layers: blocks.
        num_attention_heads, attention_head_dim: their product is the width.

    """

    in_channels: int = 16
    text_dim: int = 32
    num_layers: int = 2
    num_attention_heads: int = 2
    attention_head_dim: int = 16


class ToyBlock(nn.Module):
    """Attention and MLP, each behind a norm that the timestep steers."""

    def __init__(self, num_heads: int, head_dim: int) -> None:
        super().__init__()
        dim = num_heads * head_dim
        self.head_dim = head_dim
        self.norm1 = Modulation(dim, 3)
        self.to_q = nn.Linear(dim, dim)
        self.to_k = nn.Linear(dim, dim)
        self.to_v = nn.Linear(dim, dim)
        self.attention = Attention(num_heads, head_dim)
        self.norm2 = Modulation(dim, 3)
        self.ff = FeedForward(dim)

    def forward(self, tokens: Tensor, temb: Tensor, freqs_cis: Tensor) -> Tensor:
        """Return [B, S, C]."""
        normed, gate = self.norm1(tokens, temb)
        query, key, value = (
            linear(normed).unflatten(-1, (-1, self.head_dim)) for linear in (self.to_q, self.to_k, self.to_v)
        )
        attended = self.attention(apply_rotary_emb(query, freqs_cis), apply_rotary_emb(key, freqs_cis), value)
        tokens = gated_residual(tokens, gate, attended.flatten(2))
        normed, gate = self.norm2(tokens, temb)
        return gated_residual(tokens, gate, self.ff(normed))


class ToyTransformer2DModel(nn.Module):
    """Predicts the velocity, noise minus picture, of packed latents."""

    _repeated_blocks: ClassVar[tuple[str, ...]] = ("ToyBlock",)

    def __init__(self, architecture: ToyArchitecture) -> None:
        super().__init__()
        heads = architecture.num_attention_heads, architecture.attention_head_dim
        dim = heads[0] * heads[1]
        self.x_embedder = nn.Linear(architecture.in_channels, dim)
        self.context_embedder = nn.Linear(architecture.text_dim, dim)
        self.time_embedder = EmbeddingMLP(TIME_CHANNELS, dim)
        self.blocks = nn.ModuleList(ToyBlock(*heads) for _ in range(architecture.num_layers))
        self.norm_out = ModulatedNorm(dim)
        self.proj_out = nn.Linear(dim, architecture.in_channels)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Build from `transformer/config.json`."""
        return cls(ToyArchitecture(**config))

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, timestep: Tensor, freqs_cis: Tensor
    ) -> Tensor:
        """Return the velocity, [B, S_image, in_channels].

        Args:
            hidden_states: [B, S_image, in_channels], packed latents.
            encoder_hidden_states: [B, S_text, text_dim].
            timestep: [B], from 1000 to 0.
            freqs_cis: complex64 [S_text + S_image, D/2].

        """
        tokens = torch.cat((self.context_embedder(encoder_hidden_states), self.x_embedder(hidden_states)), dim=1)
        temb = self.time_embedder(timestep_embedding(timestep, TIME_CHANNELS).to(tokens.dtype))
        for block in self.blocks:
            tokens = block(tokens, temb, freqs_cis)
        velocity: Tensor = self.proj_out(self.norm_out(tokens[:, encoder_hidden_states.shape[1] :], temb))
        return velocity
