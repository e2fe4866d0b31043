"""The Qwen-Image transformer: blocks with two streams, for image and text (Wu et al., 2025, arXiv:2508.02324).

Reference: `QwenImageTransformer2DModel` in Diffusers; parameter names and shapes are those of its checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from safelight.attention import AttentionMetadata
from safelight.layers.embeddings import EmbeddingMLP, timestep_embedding
from safelight.layers.joint_attention import JointAttention
from safelight.layers.linear import FeedForward
from safelight.layers.modulation import GatedResidual, ModulatedNorm, NormModulate, ResidualNorm, clip_float16

TIME_CHANNELS = 256
TIME_SCALE = 1000.0


@dataclass(frozen=True)
class QwenImageArchitecture:
    """The numbers of `transformer/config.json`, with the reference's defaults.

    Attributes:
        patch_size: latent pixels along one side of a token.
        in_channels: of a token of latents.
        out_channels: of a latent pixel; those of a token if None.
        num_layers: blocks.
        attention_head_dim, num_attention_heads: their product is the width.
        joint_attention_dim: channels of the text embeddings.
        axes_dims_rope: channels of a head that turn with each position axis; their sum is the head size.
        zero_cond_t: whether input images are modulated as at time 0, whatever the time of the picture.
        use_additional_t_cond: whether the timestep's embedding is joined by one of two learned vectors.
        use_layer3d_rope: whether the first position axis counts layers; the rotary table is made elsewhere.
        guidance_embeds: must be false: the reference has no weights for it.
        pooled_projection_dim: stated by published checkpoints, and used by nothing.

    """

    patch_size: int = 2
    in_channels: int = 64
    out_channels: int | None = 16
    num_layers: int = 60
    attention_head_dim: int = 128
    num_attention_heads: int = 24
    joint_attention_dim: int = 3584
    axes_dims_rope: tuple[int, ...] = (16, 56, 56)
    zero_cond_t: bool = False
    use_additional_t_cond: bool = False
    use_layer3d_rope: bool = False
    guidance_embeds: bool = False
    pooled_projection_dim: int = 768

    @property
    def dim(self) -> int:
        """Width of the model."""
        return self.num_attention_heads * self.attention_head_dim


class TimestepConditioning(nn.Module):
    """Timesteps as vectors, [B, K] to [B, K, dim]."""

    def __init__(self, dim: int, use_additional_t_cond: bool) -> None:
        super().__init__()
        self.timestep_embedder = EmbeddingMLP(TIME_CHANNELS, dim)
        self.addition_t_embedding = nn.Embedding(2, dim) if use_additional_t_cond else None

    def forward(self, timesteps: Tensor, additional_t_cond: Tensor | None) -> Tensor:
        """Return [B, K, dim].

        Args:
            timesteps: [B, K], noise levels in [0, 1], in the model's dtype.
            additional_t_cond: int64 [B], the learned vector to add.

        """
        sinusoids = timestep_embedding(timesteps.flatten().float() * TIME_SCALE, TIME_CHANNELS).to(timesteps.dtype)
        embedded: Tensor = self.timestep_embedder(sinusoids.view(*timesteps.shape, TIME_CHANNELS))
        if self.addition_t_embedding is None:
            return embedded
        assert additional_t_cond is not None
        return torch.add(embedded, self.addition_t_embedding(additional_t_cond)[:, None])


class QwenImageTransformerBlock(nn.Module):
    """A block with two streams, each modulated by the timestep."""

    def __init__(self, dim: int, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.img_mod = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.img_norm1 = NormModulate(dim)
        self.attn = JointAttention(dim, num_heads, head_dim)
        self.img_norm2 = ResidualNorm(dim)
        self.img_mlp = FeedForward(dim)
        self.txt_mod = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.txt_norm1 = NormModulate(dim)
        self.txt_norm2 = ResidualNorm(dim)
        self.txt_mlp = FeedForward(dim)
        self.residual = GatedResidual(dim)

    def forward(
        self,
        image: Tensor,
        text: Tensor,
        temb: Tensor,
        num_noisy: int | None,
        freqs_cis: Tensor,
        metadata: AttentionMetadata,
    ) -> tuple[Tensor, Tensor]:
        """Return image [B, S_image, C] and text [B, S_text, C].

        Args:
            image: [B, S_image, C].
            text: [B, S_text, C].
            temb: [B, K, C], one vector a part of the image tokens; the first is the text's too.
            num_noisy: tokens of the first part; None where there is one.
            freqs_cis: complex64 [S_text + S_image, D/2].
            metadata: of attention.

        """
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self.img_mod(temb).chunk(6, dim=-1)
        text_modulation = self.txt_mod(temb[:, :1]).chunk(6, dim=-1)
        text_shift, text_scale, text_gate, text_mlp_shift, text_mlp_scale, text_mlp_gate = text_modulation
        normed = self.img_norm1(image, scale, shift, num_noisy)
        text_normed = self.txt_norm1(text, text_scale, text_shift)
        update, text_update = self.attn(normed, text_normed, freqs_cis, metadata)
        image, normed = self.img_norm2(image, gate, update, mlp_scale, mlp_shift, num_noisy)
        text, text_normed = self.txt_norm2(text, text_gate, text_update, text_mlp_scale, text_mlp_shift)
        image = self.residual(image, mlp_gate, self.img_mlp(normed), num_noisy)
        return clip_float16(image), clip_float16(self.residual(text, text_mlp_gate, self.txt_mlp(text_normed)))


class QwenImageTransformer2DModel(nn.Module):
    """Predicts the velocity, noise minus picture, of packed latents."""

    _repeated_blocks: ClassVar[tuple[str, ...]] = ("QwenImageTransformerBlock",)
    _sp_plan: ClassVar[Mapping[str, object]] = {
        "attention": ("transformer_blocks.*.attn.attention",),
        "rotary": "freqs_cis",
        "tokens": ("hidden_states", "condition_hidden_states"),
        "replicated": "encoder_hidden_states",
    }
    _tp_plan: ClassVar[Mapping[str, object]] = {
        "transformer_blocks.*.img_mod.1": "column, gathered",
        "transformer_blocks.*.txt_mod.1": "column, gathered",
        **{f"transformer_blocks.*.attn.{name}": style for name, style in JointAttention.tp_plan.items()},
        "transformer_blocks.*.img_mlp.net.0.proj": "column",
        "transformer_blocks.*.img_mlp.net.2": "row",
        "transformer_blocks.*.txt_mlp.net.0.proj": "column",
        "transformer_blocks.*.txt_mlp.net.2": "row",
        "norm_out.linear": "column, gathered",
    }

    def __init__(self, architecture: QwenImageArchitecture) -> None:
        super().__init__()
        if architecture.guidance_embeds:
            raise ValueError("guidance_embeds: true is not supported; Diffusers has no weights for it either")
        dim, heads = architecture.dim, (architecture.num_attention_heads, architecture.attention_head_dim)
        self.zero_cond_t = architecture.zero_cond_t
        self.time_text_embed = TimestepConditioning(dim, architecture.use_additional_t_cond)
        self.txt_norm = nn.RMSNorm(architecture.joint_attention_dim, eps=1e-6)
        self.img_in = nn.Linear(architecture.in_channels, dim)
        self.txt_in = nn.Linear(architecture.joint_attention_dim, dim)
        self.transformer_blocks = nn.ModuleList(
            QwenImageTransformerBlock(dim, *heads) for _ in range(architecture.num_layers)
        )
        self.norm_out = ModulatedNorm(dim)
        out_channels = architecture.out_channels or architecture.in_channels
        self.proj_out = nn.Linear(dim, architecture.patch_size**2 * out_channels)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Build from `transformer/config.json`."""
        return cls(QwenImageArchitecture(**config))

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        timestep: Tensor,
        freqs_cis: Tensor,
        condition_hidden_states: Tensor | None = None,
        additional_t_cond: Tensor | None = None,
        encoder_hidden_states_mask: Tensor | None = None,
    ) -> Tensor:
        """Return the velocity of the noisy tokens, [B, S, out_channels].

        Args:
            hidden_states: [B, S, in_channels], packed noisy latents.
            encoder_hidden_states: [B, S_text, joint_attention_dim].
            timestep: [B], noise level in [0, 1].
            freqs_cis: complex64 [S_text + S + S_condition, D/2].
            condition_hidden_states: [B, S_condition, in_channels], packed latents of the input images.
            additional_t_cond: int64 [B], where the model has `use_additional_t_cond`.
            encoder_hidden_states_mask: bool [B, S_text], False for padding; None where there is none.

        """
        num_noisy, timesteps = self.parts(hidden_states, condition_hidden_states, timestep)
        tokens = [hidden_states] if condition_hidden_states is None else [hidden_states, condition_hidden_states]
        image = self.img_in(torch.cat(tokens, dim=1))
        text = self.txt_in(self.txt_norm(encoder_hidden_states))
        temb = self.time_text_embed(timesteps, additional_t_cond)
        metadata = joint_metadata(encoder_hidden_states_mask, image.shape[1])
        for block in self.transformer_blocks:
            image, text = block(image, text, temb, num_noisy, freqs_cis, metadata)
        velocity: Tensor = self.proj_out(self.norm_out(image[:, : hidden_states.shape[1]], temb[:, 0]))
        return velocity

    def parts(self, noisy: Tensor, condition: Tensor | None, timestep: Tensor) -> tuple[int | None, Tensor]:
        """Return the timesteps [B, K] of the image stream's parts, and before them the tokens of the first of two."""
        timesteps = timestep.to(noisy.dtype)[:, None]
        if condition is None or not self.zero_cond_t:
            return None, timesteps
        return noisy.shape[1], torch.cat((timesteps, torch.zeros_like(timesteps)), dim=1)


def joint_metadata(text_mask: Tensor | None, num_image_tokens: int) -> AttentionMetadata:
    """Return what attention over text and image is told of padding, given the text's mask [B, S_text]."""
    if text_mask is None:
        return AttentionMetadata()
    return AttentionMetadata(functional.pad(text_mask, (0, num_image_tokens), value=True)[:, None, None])
