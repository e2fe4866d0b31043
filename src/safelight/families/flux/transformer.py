"""The FLUX.1 transformer: blocks with two streams for text and image, then blocks with one.

Reference: `FluxTransformer2DModel` in Diffusers; parameter names and shapes are those of its checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from safelight.layers.embeddings import EmbeddingMLP, timestep_embedding
from safelight.layers.modulation import ModulatedNorm
from safelight.layers.stream_blocks import DoubleStreamBlock, SingleStreamBlock, blocks_tp_plan

TIME_CHANNELS = 256


@dataclass(frozen=True)
class FluxArchitecture:
    """The numbers of `transformer/config.json`, with the reference's defaults.

    Attributes:
        in_channels, out_channels: of a token of latents.
        num_layers: blocks of two streams.
        num_single_layers: blocks of one stream.
        attention_head_dim, num_attention_heads: their product is the width.
        joint_attention_dim: channels of the T5 embeddings.
        pooled_projection_dim: channels of the pooled CLIP embedding.
        guidance_embeds: whether the guidance scale is an input.
        axes_dims_rope: channels of a head that turn with each position axis; their sum is the head size.

    """

    in_channels: int = 64
    out_channels: int | None = None
    num_layers: int = 19
    num_single_layers: int = 38
    attention_head_dim: int = 128
    num_attention_heads: int = 24
    joint_attention_dim: int = 4096
    pooled_projection_dim: int = 768
    guidance_embeds: bool = False
    axes_dims_rope: tuple[int, ...] = (16, 56, 56)
    patch_size: int = 1

    @property
    def dim(self) -> int:
        """Width of the model."""
        return self.num_attention_heads * self.attention_head_dim


class ConditioningEmbedding(nn.Module):
    """Timestep, guidance scale and pooled text as one vector, [B, dim]."""

    def __init__(self, architecture: FluxArchitecture) -> None:
        super().__init__()
        dim = architecture.dim
        self.timestep_embedder = EmbeddingMLP(TIME_CHANNELS, dim)
        if architecture.guidance_embeds:
            self.guidance_embedder = EmbeddingMLP(TIME_CHANNELS, dim)
        self.text_embedder = EmbeddingMLP(architecture.pooled_projection_dim, dim)

    def forward(self, timestep: Tensor, guidance: Tensor | None, pooled_projections: Tensor) -> Tensor:
        """Return [B, dim]; timestep and guidance [B], times 1000 already."""
        dtype = pooled_projections.dtype
        embedded: Tensor = self.timestep_embedder(timestep_embedding(timestep, TIME_CHANNELS).to(dtype))
        if guidance is not None:
            embedded = embedded + self.guidance_embedder(timestep_embedding(guidance, TIME_CHANNELS).to(dtype))
        return torch.add(embedded, self.text_embedder(pooled_projections))


class FluxTransformer2DModel(nn.Module):
    """Predicts the velocity, noise minus picture, of packed latents."""

    _repeated_blocks: ClassVar[tuple[str, ...]] = ("DoubleStreamBlock", "SingleStreamBlock")
    _sp_plan: ClassVar[Mapping[str, object]] = {
        "attention": ("transformer_blocks.*.attn.attention", "single_transformer_blocks.*.attn.attention"),
        "rotary": "freqs_cis",
        "tokens": ("hidden_states",),
        "replicated": "encoder_hidden_states",
    }
    _tp_plan: ClassVar[Mapping[str, object]] = {
        **blocks_tp_plan(),
        "norm_out.linear": "column, gathered",
    }

    def __init__(self, architecture: FluxArchitecture) -> None:
        super().__init__()
        out_channels = architecture.out_channels or architecture.in_channels
        dim, heads = architecture.dim, (architecture.num_attention_heads, architecture.attention_head_dim)
        self.time_text_embed = ConditioningEmbedding(architecture)
        self.context_embedder = nn.Linear(architecture.joint_attention_dim, dim)
        self.x_embedder = nn.Linear(architecture.in_channels, dim)
        self.transformer_blocks = nn.ModuleList(DoubleStreamBlock(dim, *heads) for _ in range(architecture.num_layers))
        self.single_transformer_blocks = nn.ModuleList(
            SingleStreamBlock(dim, *heads) for _ in range(architecture.num_single_layers)
        )
        self.norm_out = ModulatedNorm(dim)
        self.proj_out = nn.Linear(dim, architecture.patch_size**2 * out_channels)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Build from `transformer/config.json`."""
        return cls(FluxArchitecture(**config))

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        timestep: Tensor,
        freqs_cis: Tensor,
        guidance: Tensor | None = None,
    ) -> Tensor:
        """Return the velocity, [B, S_image, out_channels].

        Args:
            hidden_states: [B, S_image, in_channels], packed latents.
            encoder_hidden_states: [B, S_text, joint_attention_dim], T5's.
            pooled_projections: [B, pooled_projection_dim], CLIP's.
            timestep: [B], noise level in [0, 1].
            freqs_cis: complex64 [S_text + S_image, D/2].
            guidance: [B], scale of the embedded guidance.

        """
        image = self.x_embedder(hidden_states)
        text = self.context_embedder(encoder_hidden_states)
        scaled_guidance = None if guidance is None else guidance.to(image.dtype) * 1000
        temb = self.time_text_embed(timestep.to(image.dtype) * 1000, scaled_guidance, pooled_projections)
        for block in self.transformer_blocks:
            image, text = block(image, text, temb, temb, freqs_cis)
        joined = torch.cat((text, image), dim=1)
        for block in self.single_transformer_blocks:
            joined = block(joined, temb, freqs_cis)
        velocity: Tensor = self.proj_out(self.norm_out(joined[:, text.shape[1] :], temb))
        return velocity
