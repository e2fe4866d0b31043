"""The Chroma transformer: FLUX's blocks, steered by a table that a small network makes of time and place.

Reference: `ChromaTransformer2DModel` in Diffusers; parameter names and shapes are those of its checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from safelight.attention import AttentionMetadata
from safelight.layers.embeddings import EmbeddingMLP, timestep_embedding
from safelight.layers.modulation import GivenModulation
from safelight.layers.stream_blocks import DoubleStreamBlock, SingleStreamBlock


@dataclass(frozen=True)
class ChromaArchitecture:
    """The numbers of `transformer/config.json`, with the reference's defaults.

    Attributes:
        patch_size: latent pixels along one side of a token's part of the output.
        in_channels, out_channels: of a token of latents.
        num_layers: blocks of two streams.
        num_single_layers: blocks of one stream.
        attention_head_dim, num_attention_heads: their product is the width.
        joint_attention_dim: channels of the text embeddings.
        axes_dims_rope: channels of a head that turn with each position axis; their sum is the head size.
        approximator_num_channels, approximator_hidden_dim, approximator_layers: of the network that steers the blocks.

    """

    patch_size: int = 1
    in_channels: int = 64
    out_channels: int | None = None
    num_layers: int = 19
    num_single_layers: int = 38
    attention_head_dim: int = 128
    num_attention_heads: int = 24
    joint_attention_dim: int = 4096
    axes_dims_rope: tuple[int, ...] = (16, 56, 56)
    approximator_num_channels: int = 64
    approximator_hidden_dim: int = 5120
    approximator_layers: int = 5


class Approximator(nn.Module):
    """Makes the vectors that steer all blocks: [B, K, in_dim] to [B, K, dim]."""

    def __init__(self, in_dim: int, dim: int, hidden_dim: int, num_layers: int) -> None:
        super().__init__()
        self.in_proj = nn.Linear(in_dim, hidden_dim)
        self.layers = nn.ModuleList(EmbeddingMLP(hidden_dim, hidden_dim) for _ in range(num_layers))
        self.norms = nn.ModuleList(nn.RMSNorm(hidden_dim) for _ in range(num_layers))
        self.out_proj = nn.Linear(hidden_dim, dim)

    def forward(self, places: Tensor) -> Tensor:
        """Return [B, K, dim]."""
        hidden = self.in_proj(places)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            hidden = hidden + layer(norm(hidden))
        vectors: Tensor = self.out_proj(hidden)
        return vectors


class ChromaTransformer2DModel(nn.Module):
    """Predicts the velocity, noise minus picture, of packed latents."""

    _repeated_blocks: ClassVar[tuple[str, ...]] = ("DoubleStreamBlock", "SingleStreamBlock")

    def __init__(self, architecture: ChromaArchitecture) -> None:
        super().__init__()
        heads = architecture.num_attention_heads, architecture.attention_head_dim
        dim = heads[0] * heads[1]
        self.time_channels = architecture.approximator_num_channels // 4
        self.num_layers, self.num_single_layers = architecture.num_layers, architecture.num_single_layers
        self.distilled_guidance_layer = Approximator(
            architecture.approximator_num_channels,
            dim,
            architecture.approximator_hidden_dim,
            architecture.approximator_layers,
        )
        self.context_embedder = nn.Linear(architecture.joint_attention_dim, dim)
        self.x_embedder = nn.Linear(architecture.in_channels, dim)
        self.transformer_blocks = nn.ModuleList(
            DoubleStreamBlock(dim, *heads, GivenModulation) for _ in range(self.num_layers)
        )
        self.single_transformer_blocks = nn.ModuleList(
            SingleStreamBlock(dim, *heads, GivenModulation) for _ in range(self.num_single_layers)
        )
        self.norm_out = GivenModulation(dim, 2)
        out_channels = architecture.out_channels or architecture.in_channels
        self.proj_out = nn.Linear(dim, architecture.patch_size**2 * out_channels)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Build from `transformer/config.json`."""
        return cls(ChromaArchitecture(**config))

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_mask: Tensor,
        timestep: Tensor,
        freqs_cis: Tensor,
    ) -> Tensor:
        """Return the velocity, [B, S_image, out_channels].

        Args:
            hidden_states: [B, S_image, in_channels], packed latents.
            encoder_hidden_states: [B, S_text, joint_attention_dim].
            encoder_hidden_states_mask: [B, S_text], 1 for tokens that are seen and 0 for the others.
            timestep: [B], noise level in [0, 1].
            freqs_cis: complex64 [S_text + S_image, D/2].

        """
        image, text = self.x_embedder(hidden_states), self.context_embedder(encoder_hidden_states)
        mask = F.pad(encoder_hidden_states_mask, (0, image.shape[1]), value=1.0)
        # Added to the scores as it is, ones and zeros, which is how the model was trained.
        metadata = AttentionMetadata(mask[:, None, None, :] * mask[:, None, :, None])
        vectors = self.distilled_guidance_layer(self.places(timestep.to(image.dtype) * 1000))
        counts = (3 * self.num_single_layers, 6 * self.num_layers, 6 * self.num_layers, 2)
        single, double, double_text, last = vectors.split(counts, dim=1)
        each = zip(self.transformer_blocks, double.split(6, dim=1), double_text.split(6, dim=1), strict=False)
        for block, temb, text_temb in each:
            image, text = block(image, text, temb, text_temb, freqs_cis, metadata)
        joined = torch.cat((text, image), dim=1)
        for block, temb in zip(self.single_transformer_blocks, single.split(3, dim=1), strict=False):
            joined = block(joined, temb, freqs_cis, metadata)
        (normed,) = self.norm_out(joined[:, text.shape[1] :], last)
        velocity: Tensor = self.proj_out(normed)
        return velocity

    def places(self, timestep: Tensor) -> Tensor:
        """Return [B, K, C]: for each vector the sinusoids of the time, of a guidance of 0, and of its number."""
        num_vectors = 3 * self.num_single_layers + 12 * self.num_layers + 2
        numbers = timestep_embedding(torch.arange(num_vectors, device=timestep.device) * 1000, 2 * self.time_channels)
        time, guidance = (
            timestep_embedding(value, self.time_channels)[:, None].expand(-1, num_vectors, -1)
            for value in (timestep, torch.zeros_like(timestep))
        )
        numbers = numbers.expand(len(timestep), -1, -1)
        return torch.cat((time, guidance, numbers), dim=-1).to(timestep.dtype)
