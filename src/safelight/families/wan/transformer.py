"""The Wan transformer: self-attention over the tokens of a video, cross-attention to text and, in 2.1, to images.

Reference: `WanTransformer3DModel` in Diffusers; parameter names and shapes are those of its checkpoints. Norms,
modulation and the embedding of time are computed in float32, whatever the rest is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from safelight.attention import Attention
from safelight.layers.embeddings import EmbeddingMLP, timestep_embedding
from safelight.layers.linear import FeedForward
from safelight.layers.modulation import GatedResidual, NormModulate, ResidualNorm
from safelight.layers.rotary import QKNormRotary

QK_NORM = "rms_norm_across_heads"


@dataclass(frozen=True)
class WanArchitecture:
    """The numbers of `transformer/config.json`, with the reference's defaults.

    Attributes:
        patch_size: frames, rows and columns of latent pixels that are one token.
        num_attention_heads, attention_head_dim: their product is the width.
        in_channels, out_channels: of the latents; an image's latents and mask are input channels too.
        text_dim: channels of the text embeddings.
        freq_dim: channels of the sinusoids of time.
        ffn_dim: width inside the MLPs.
        num_layers: blocks.
        cross_attn_norm: whether the tokens are normed before cross-attention.
        qk_norm: always over all heads together.
        eps: of the norms.
        image_dim: channels of the image embeddings; None where the model takes none.
        added_kv_proj_dim: the same in cross-attention, after their MLP; without it they join the text there.
        rope_max_seq_len: not needed here, where the rotary table is as long as the video.
        pos_embed_seq_len: tokens of a learned position embedding over a first and a last image.

    """

    patch_size: tuple[int, int, int] = (1, 2, 2)
    num_attention_heads: int = 40
    attention_head_dim: int = 128
    in_channels: int = 16
    out_channels: int | None = 16
    text_dim: int = 4096
    freq_dim: int = 256
    ffn_dim: int = 13824
    num_layers: int = 40
    cross_attn_norm: bool = True
    qk_norm: str = QK_NORM
    eps: float = 1e-6
    image_dim: int | None = None
    added_kv_proj_dim: int | None = None
    rope_max_seq_len: int = 1024
    pos_embed_seq_len: int | None = None

    @property
    def dim(self) -> int:
        """Width of the model."""
        return self.num_attention_heads * self.attention_head_dim


class Float32LayerNorm(nn.LayerNorm):
    """Layer norm in float32, whatever comes in; its weights are float32."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return float32 of the same shape."""
        return super().forward(hidden_states.float())


class WanImageEmbedding(nn.Module):
    """Image embeddings as tokens of the model's width, [B, S, image_dim] to [B, S, C]."""

    def __init__(self, in_dim: int, dim: int, pos_embed_seq_len: int | None) -> None:
        super().__init__()
        self.norm1 = Float32LayerNorm(in_dim)
        self.ff = FeedForward(in_dim, in_dim, dim, approximate="none")
        self.norm2 = Float32LayerNorm(dim)
        self.pos_embed = None if pos_embed_seq_len is None else nn.Parameter(torch.zeros(1, pos_embed_seq_len, in_dim))

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return [B, S, C]."""
        if self.pos_embed is not None:
            hidden_states = hidden_states + self.pos_embed
        normed = self.norm1(hidden_states).to(hidden_states.dtype)
        embedded: Tensor = self.norm2(self.ff(normed)).to(hidden_states.dtype)
        return embedded


class WanConditionEmbedding(nn.Module):
    """Time, text and images as the blocks take them."""

    def __init__(self, architecture: WanArchitecture) -> None:
        super().__init__()
        dim, self.freq_dim = architecture.dim, architecture.freq_dim
        self.time_embedder = EmbeddingMLP(architecture.freq_dim, dim)
        self.act_fn = nn.SiLU()
        self.time_proj = nn.Linear(dim, 6 * dim)
        self.text_embedder = EmbeddingMLP(architecture.text_dim, dim, nn.GELU(approximate="tanh"))
        self.image_embedder = None
        if architecture.image_dim is not None:
            self.image_embedder = WanImageEmbedding(architecture.image_dim, dim, architecture.pos_embed_seq_len)

    def forward(self, timestep: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the embedding of time, [B, G, C], and the blocks' modulation, [B, G, 6, C], for timesteps [B, G]."""
        sinusoids = timestep_embedding(timestep.flatten(), self.freq_dim).view(*timestep.shape, -1)
        temb = self.time_embedder(sinusoids).to(dtype)
        return temb, self.time_proj(self.act_fn(temb)).unflatten(-1, (6, -1)).float()


class WanAttention(nn.Module):
    """Projections, and norms of queries and keys over all heads together."""

    def __init__(self, architecture: WanArchitecture) -> None:
        super().__init__()
        dim = architecture.dim
        self.head_dim = architecture.attention_head_dim
        self.to_q = nn.Linear(dim, dim)
        self.to_k = nn.Linear(dim, dim)
        self.to_v = nn.Linear(dim, dim)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])
        self.norm_q = nn.RMSNorm(dim, eps=architecture.eps)
        self.norm_k = nn.RMSNorm(dim, eps=architecture.eps)
        self.attention = Attention(architecture.num_attention_heads, self.head_dim)

    def heads(self, hidden_states: Tensor) -> Tensor:
        """Return [B, S, H, D] of [B, S, C]."""
        return hidden_states.view(*hidden_states.shape[:2], -1, self.head_dim)


class WanSelfAttention(WanAttention):
    """Attention of the tokens to each other."""

    def __init__(self, architecture: WanArchitecture) -> None:
        super().__init__(architecture)
        heads = (architecture.num_attention_heads, self.head_dim)
        self.rotary = QKNormRotary(*heads, across_heads=True, eps=architecture.eps)

    def forward(self, hidden_states: Tensor, freqs_cis: Tensor) -> Tensor:
        """Return [B, S, C]."""
        query, key, value = (self.heads(linear(hidden_states)) for linear in (self.to_q, self.to_k, self.to_v))
        query, key = self.rotary(query, key, self.norm_q.weight, self.norm_k.weight, freqs_cis)
        attended = self.attention(query, key, value)
        projected: Tensor = self.to_out[0](attended.flatten(2))
        return projected


class WanCrossAttention(WanAttention):
    """Attention of the tokens to the text, and beside it to the images, with the same queries."""

    def __init__(self, architecture: WanArchitecture) -> None:
        super().__init__(architecture)
        if architecture.added_kv_proj_dim is not None:
            self.add_k_proj = nn.Linear(architecture.added_kv_proj_dim, architecture.dim)
            self.add_v_proj = nn.Linear(architecture.added_kv_proj_dim, architecture.dim)
            self.norm_added_k = nn.RMSNorm(architecture.dim, eps=architecture.eps)

    def forward(self, hidden_states: Tensor, text: Tensor, images: Tensor | None) -> Tensor:
        """Return [B, S, C]; text [B, S_text, C], images [B, S_images, C] or None."""
        query = self.heads(self.norm_q(self.to_q(hidden_states)))
        key = self.heads(self.norm_k(self.to_k(text)))
        attended = self.attention(query, key, self.heads(self.to_v(text)))
        if images is not None:
            key = self.heads(self.norm_added_k(self.add_k_proj(images)))
            attended = attended + self.attention(query, key, self.heads(self.add_v_proj(images)))
        projected: Tensor = self.to_out[0](attended.flatten(2))
        return projected


class ResidualWithoutNorm(nn.Module):
    """The end of self-attention where no norm comes before cross-attention."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.residual = GatedResidual(dim)

    def forward(
        self, residual: Tensor, gate: Tensor, update: Tensor, *, group_size: int | None
    ) -> tuple[Tensor, Tensor]:
        """Return the sum, [B, S, C], as it is and as what would be its norm."""
        total: Tensor = self.residual(residual, gate, update, group_size)
        return total, total


class WanTransformerBlock(nn.Module):
    """Self-attention, cross-attention and an MLP; time steers the first and the last."""

    def __init__(self, architecture: WanArchitecture) -> None:
        super().__init__()
        dim, eps = architecture.dim, architecture.eps
        self.norm1 = NormModulate(dim, eps)
        self.attn1 = WanSelfAttention(architecture)
        self.attn2 = WanCrossAttention(architecture)
        self.norm2 = (
            ResidualNorm(dim, eps, elementwise_affine=True)
            if architecture.cross_attn_norm
            else ResidualWithoutNorm(dim)
        )
        self.ffn = FeedForward(dim, architecture.ffn_dim)
        self.norm3 = ResidualNorm(dim, eps)
        self.residual = GatedResidual(dim)
        self.scale_shift_table = nn.Parameter(torch.zeros(1, 6, dim))

    def forward(
        self, hidden_states: Tensor, text: Tensor, images: Tensor | None, temb: Tensor, freqs_cis: Tensor
    ) -> Tensor:
        """Return [B, S, C].

        Args:
            hidden_states: [B, S, C].
            text: [B, S_text, C].
            images: [B, S_images, C], or None.
            temb: float32 [B, G, 6, C], for G groups of as many tokens that share a timestep.
            freqs_cis: complex64 [S, D/2].

        """
        steering, group_size = self.scale_shift_table[:, None] + temb, tokens_of_group(hidden_states, temb)
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = steering.unbind(2)  # B G C each
        update = self.attn1(self.norm1(hidden_states, scale, shift, group_size), freqs_cis)
        hidden_states, normed = self.norm2(hidden_states, gate, update, group_size=group_size)
        update = self.attn2(normed, text, images)
        hidden_states, normed = self.norm3(hidden_states, None, update, mlp_scale, mlp_shift, group_size)
        ended: Tensor = self.residual(hidden_states, mlp_gate, self.ffn(normed), group_size)
        return ended


class WanTransformer3DModel(nn.Module):
    """Predicts the velocity, noise minus video, of latents."""

    _repeated_blocks: ClassVar[tuple[str, ...]] = ("WanTransformerBlock",)
    _sp_plan: ClassVar[Mapping[str, object]] = {
        "attention": ("blocks.*.attn1.attention",),
        "rotary": "freqs_cis",
        "first_block": "blocks.0",
        "groups": ("timestep",),
        "output": "proj_out",
    }
    _tp_plan: ClassVar[Mapping[str, object]] = {
        "condition_embedder.time_proj": "column, gathered",
        "blocks.*.attn1.to_q": "column",
        "blocks.*.attn1.to_k": "column",
        "blocks.*.attn1.to_v": "column",
        "blocks.*.attn1.norm_q": "norm",
        "blocks.*.attn1.norm_k": "norm",
        "blocks.*.attn1.rotary": "rotary",
        "blocks.*.attn1.to_out.0": "row",
        "blocks.*.attn2.to_q": "column",
        "blocks.*.attn2.to_k": "column",
        "blocks.*.attn2.to_v": "column",
        "blocks.*.attn2.norm_q": "norm",
        "blocks.*.attn2.norm_k": "norm",
        "blocks.*.attn2.add_k_proj": "column",
        "blocks.*.attn2.add_v_proj": "column",
        "blocks.*.attn2.norm_added_k": "norm",
        "blocks.*.attn2.to_out.0": "row",
        "blocks.*.ffn.net.0.proj": "column",
        "blocks.*.ffn.net.2": "row",
    }
    _keep_in_fp32_modules: ClassVar[tuple[str, ...]] = (
        "time_embedder",
        "scale_shift_table",
        "norm1",
        "norm2",
        "norm3",
    )
    _keys_to_ignore_on_load_unexpected: ClassVar[tuple[str, ...]] = ("norm_added_q", "to_gate_compress")
    """Of checkpoints: a norm that nothing uses, and FastWan's gate of sparse attention, which is dense here."""

    def __init__(self, architecture: WanArchitecture) -> None:
        super().__init__()
        if architecture.qk_norm != QK_NORM:
            raise ValueError(f"qk_norm: got {architecture.qk_norm!r}; it takes {QK_NORM!r}")
        if architecture.freq_dim % 2:
            raise ValueError(f"freq_dim: got {architecture.freq_dim}; it takes an even number")
        dim, self.patch_size = architecture.dim, architecture.patch_size
        patch_volume = self.patch_size[0] * self.patch_size[1] * self.patch_size[2]
        self.joins_images = architecture.added_kv_proj_dim is None
        self.patch_embedding = nn.Conv3d(architecture.in_channels, dim, self.patch_size, self.patch_size)
        self.condition_embedder = WanConditionEmbedding(architecture)
        self.blocks = nn.ModuleList(WanTransformerBlock(architecture) for _ in range(architecture.num_layers))
        self.norm_out = NormModulate(dim, architecture.eps)
        self.proj_out = nn.Linear(dim, (architecture.out_channels or architecture.in_channels) * patch_volume)
        self.scale_shift_table = nn.Parameter(torch.zeros(1, 2, dim))

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Build from `transformer/config.json`."""
        return cls(WanArchitecture(**config))

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        freqs_cis: Tensor,
        encoder_hidden_states_image: Tensor | None = None,
    ) -> Tensor:
        """Return the velocity, [B, out_channels, T, H, W].

        Args:
            hidden_states: [B, in_channels, T, H, W], latents.
            timestep: [B, G], from 0 to 1000: one for all tokens (G = 1), or one a latent frame.
            encoder_hidden_states: [B, S_text, text_dim].
            freqs_cis: complex64 [S, D/2].
            encoder_hidden_states_image: [B, S_images, image_dim], where the model takes them, and None where not.

        """
        dtype, embedder = self.patch_embedding.weight.dtype, self.condition_embedder
        patches = self.patch_embedding(hidden_states.to(dtype))  # B C T H W, of tokens
        temb, steering = embedder(timestep, dtype)
        text, images = embedder.text_embedder(encoder_hidden_states.to(dtype)), None
        if encoder_hidden_states_image is not None:
            assert embedder.image_embedder is not None
            images = embedder.image_embedder(encoder_hidden_states_image)
        if images is not None and self.joins_images:
            text, images = torch.cat((images, text), dim=1), None
        tokens = patches.flatten(2).transpose(1, 2).contiguous()
        for block in self.blocks:
            tokens = block(tokens, text, images, steering, freqs_cis)
        shift, scale = (self.scale_shift_table[:, None] + temb[:, :, None]).unbind(2)
        tokens = self.norm_out(tokens, scale, shift, tokens_of_group(tokens, temb))
        return self.unpatchify(self.proj_out(tokens), patches.shape)

    def unpatchify(self, tokens: Tensor, grid: torch.Size) -> Tensor:
        """Return [B, C, T, H, W] in latent pixels of tokens [B, S, C * patch]; grid is B, any, T, H, W of tokens."""
        patches = tokens.view(grid[0], *grid[2:], *self.patch_size, -1)  # B T H W t h w C
        return patches.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)


def tokens_of_group(tokens: Tensor, temb: Tensor) -> int | None:
    """Return how many of the tokens [B, S, C] share each timestep of [B, G, ...]; None where all share one."""
    return None if temb.shape[1] == 1 else tokens.shape[1] // temb.shape[1]
