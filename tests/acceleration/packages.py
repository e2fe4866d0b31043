"""Tiny random checkpoints of five pipelines of the package, whose networks have more blocks than stay on a device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoTransformer3DModel,
    LTXVideoTransformer3DModel,
    SD3Transformer2DModel,
)
from transformers import CLIPTextModel, LlamaConfig, LlamaModel

from safelight.testing.recipes import shake
from safelight.testing.tokenizers import clip_tokenizer, t5_tokenizer
from tests.backends import conftest
from tests.recipes import wan


def stable_diffusion_3(folder: Path) -> dict[str, Any]:
    """Return SD3's components; the last block has no text stream, as in the published model."""
    transformer = SD3Transformer2DModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        num_layers=4,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=32,
        pos_embed_max_size=256,
    )
    return {**conftest.stable_diffusion_3(folder), "transformer": shake(transformer, 1)}


def ltx(folder: Path) -> dict[str, Any]:
    """Return LTX's components."""
    transformer = LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        num_layers=4,
        caption_channels=32,
    )
    return {**conftest.ltx(folder), "transformer": shake(transformer, 1)}


def hunyuan_video(folder: Path) -> dict[str, Any]:
    """Return HunyuanVideo's components: blocks of two classes, and others that its table names."""
    t5, clip = t5_tokenizer(folder / "tokenizer"), clip_tokenizer(folder / "tokenizer_2", 77)
    transformer = HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=3,
        num_single_layers=3,
        num_refiner_layers=1,
        patch_size=1,
        text_embed_dim=16,
        pooled_projection_dim=16,
        rope_axes_dim=(4, 4, 4),
    )
    vae = AutoencoderKLHunyuanVideo(
        latent_channels=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 3,
        up_block_types=("HunyuanVideoUpBlock3D",) * 3,
        block_out_channels=(8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        spatial_compression_ratio=4,
        temporal_compression_ratio=4,
    )
    llama = LlamaConfig(
        vocab_size=len(t5),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        pad_token_id=t5.pad_token_id,
    )
    return {
        "transformer": shake(transformer, 1),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=7.0),
        "vae": shake(vae, 2),
        "text_encoder": shake(LlamaModel(llama), 3),
        "tokenizer": t5,
        "text_encoder_2": conftest.clip_text(CLIPTextModel, clip, 16, 4, length=77),
        "tokenizer_2": clip,
    }


def two_networks(folder: Path) -> dict[str, Any]:
    """Return Wan 2.2's components: steps of much noise have another network than those of little."""
    networks = {
        "transformer": wan.transformer(4, 4, 4, num_layers=4),
        "transformer_2": wan.transformer(5, 4, 4, num_layers=4),
    }
    vae = shake(wan.vae(False), 1)
    return {
        **wan.text_components(folder),
        **networks,
        "vae": vae,
        "scheduler": wan.solver(3.0),
        "boundary_ratio": 0.875,
    }


BUILDERS = {
    "StableDiffusionXLPipeline": conftest.stable_diffusion_xl,
    "StableDiffusion3Pipeline": stable_diffusion_3,
    "LTXPipeline": ltx,
    "HunyuanVideoPipeline": hunyuan_video,
    "WanPipeline": two_networks,
}
"""A UNet, transformers of picture and video, and one pipeline with two of them."""
FIELDS: dict[str, dict[str, Any]] = {
    "StableDiffusionXLPipeline": {"height": 32, "width": 48, "negative_prompt": "blurry"},
    "StableDiffusion3Pipeline": {"height": 32, "width": 48, "negative_prompt": "blurry"},
    "LTXPipeline": {"height": 32, "width": 64, "num_frames": 9},
    "HunyuanVideoPipeline": {"height": 32, "width": 48, "num_frames": 5, "max_sequence_length": 64},
    "WanPipeline": {"height": 32, "width": 48, "num_frames": 5, "max_sequence_length": 32},
}
COMMON = {"prompt": "a cat in the rain", "num_inference_steps": 4, "output_type": "np"}


def build(name: str, folder: Path) -> Path:
    """Write a checkpoint."""
    torch.manual_seed(0)
    getattr(diffusers, name)(**BUILDERS[name](folder)).save_pretrained(folder)
    return folder
