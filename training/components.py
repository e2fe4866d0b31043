"""The repository's components beside the autoencoder: architecture, fresh weights, conditioning."""

from __future__ import annotations

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from training.tokenizers import CLIP_MAX_LENGTH, T5_MAX_LENGTH

LATENT_CHANNELS = 8
CLIP_WIDTH = 64
T5_WIDTH = 96
# sigma = SHIFT * u / (1 + (SHIFT - 1) * u), in training and in the scheduler alike.
SHIFT = 2.0


def make_transformer() -> FluxTransformer2DModel:
    """FLUX at 128 channels; every block starts as the identity (Peebles & Xie 2022, adaLN-zero)."""
    transformer = FluxTransformer2DModel(
        in_channels=4 * LATENT_CHANNELS,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=T5_WIDTH,
        pooled_projection_dim=CLIP_WIDTH,
        guidance_embeds=False,
        axes_dims_rope=(8, 12, 12),
    )
    zeroed = [transformer.proj_out, transformer.norm_out.linear]
    for block in transformer.transformer_blocks:
        zeroed += [block.norm1.linear, block.norm1_context.linear]
    zeroed += [block.norm.linear for block in transformer.single_transformer_blocks]
    for linear in zeroed:
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
    return transformer


def make_clip(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """The encoder whose pooled output enters with the timestep."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=CLIP_WIDTH,
            intermediate_size=4 * CLIP_WIDTH,
            projection_dim=CLIP_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=CLIP_MAX_LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            # CLIP's own start of 0.02 is for 512 channels; at 64 the words would start as noise.
            initializer_factor=4.0,
        )
    )


def make_t5(tokenizer: T5Tokenizer) -> T5EncoderModel:
    """The encoder whose tokens the transformer attends to."""
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=T5_WIDTH,
            d_kv=24,
            d_ff=2 * T5_WIDTH,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            is_encoder_decoder=False,
            use_cache=False,
            tie_word_embeddings=False,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def make_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """The solver with the shift that training used."""
    return FlowMatchEulerDiscreteScheduler(shift=SHIFT, use_dynamic_shifting=False)


def token_ids(prompts: list[str], clip_tokenizer: CLIPTokenizer, t5_tokenizer: T5Tokenizer) -> tuple[Tensor, Tensor]:
    """What FluxPipeline gives the two encoders: ids `[B, 32]`, padded, without a mask."""
    clip_ids = clip_tokenizer(
        prompts,
        padding="max_length",
        max_length=CLIP_MAX_LENGTH,
        truncation=True,
        return_tensors="pt",
    ).input_ids
    t5_ids = t5_tokenizer(
        prompts,
        padding="max_length",
        max_length=T5_MAX_LENGTH,
        truncation=True,
        return_tensors="pt",
    ).input_ids
    return clip_ids, t5_ids


def pack_latents(latents: Tensor) -> Tensor:
    """`[B, C, H, W]` to 2x2 patches `[B, H/2 * W/2, 4C]`, as FluxPipeline packs."""
    batch_size, channels, height, width = latents.shape
    patches = latents.view(batch_size, channels, height // 2, 2, width // 2, 2)
    patches = patches.permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(batch_size, height // 2 * (width // 2), 4 * channels)


def image_ids(height: int, width: int) -> Tensor:
    """Rotary positions `[H/2 * W/2, 3]` of the patches of latents `[H, W]`."""
    ids = torch.zeros(height // 2, width // 2, 3)
    ids[..., 1] = torch.arange(height // 2)[:, None]
    ids[..., 2] = torch.arange(width // 2)[None]
    return ids.reshape(-1, 3)
