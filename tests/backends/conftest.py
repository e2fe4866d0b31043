"""Tiny random checkpoints of pipelines that have no family here."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLLTXVideo,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LTXVideoTransformer3DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from safelight.testing.recipes import shake
from safelight.testing.tokenizers import clip_tokenizer, t5_tokenizer
from tests.backends import builders


def clip_text(cls, clip, width, seed, length=16):
    config = CLIPTextConfig(
        vocab_size=len(clip),
        hidden_size=width,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=length,
        projection_dim=width,
        bos_token_id=clip.bos_token_id,
        eos_token_id=clip.eos_token_id,
        pad_token_id=clip.pad_token_id,
    )
    return shake(cls(config), seed)


def t5_text(t5, seed):
    return shake(
        T5EncoderModel(T5Config(vocab_size=len(t5), d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)), seed
    )


def autoencoder(seed, channels=4):
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        latent_channels=channels,
        norm_num_groups=4,
        shift_factor=0.06,
    )
    return shake(vae, seed)


def stable_diffusion_3(folder, channels=4):
    clip, t5 = clip_tokenizer(folder / "tokenizer", 16), t5_tokenizer(folder / "tokenizer_3")
    transformer = SD3Transformer2DModel(
        sample_size=16,
        in_channels=channels,
        out_channels=channels,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=32,
        pos_embed_max_size=64,
    )
    return {
        "transformer": shake(transformer, 1),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
        "vae": autoencoder(2, channels),
        "text_encoder": clip_text(CLIPTextModelWithProjection, clip, 16, 3),
        "tokenizer": clip,
        "text_encoder_2": clip_text(CLIPTextModelWithProjection, clip, 16, 4),
        "tokenizer_2": clip,
        "text_encoder_3": t5_text(t5, 5),
        "tokenizer_3": t5,
    }


def stable_diffusion_xl(folder):
    clip = clip_tokenizer(folder / "tokenizer", 16)
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        transformer_layers_per_block=(1, 1),
        projection_class_embeddings_input_dim=16 + 6 * 8,
        cross_attention_dim=32,
    )
    return {
        "unet": shake(unet, 1),
        "scheduler": EulerDiscreteScheduler(),
        "vae": autoencoder(2),
        "text_encoder": clip_text(CLIPTextModel, clip, 16, 3),
        "tokenizer": clip,
        "text_encoder_2": clip_text(CLIPTextModelWithProjection, clip, 16, 4),
        "tokenizer_2": clip,
    }


def ltx(folder):
    t5 = t5_tokenizer(folder / "tokenizer")
    transformer = LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        num_layers=2,
        caption_channels=32,
    )
    vae = AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False, False, False, False, False),
        upsample_residual=(False, False, False, False),
        upsample_factor=(1, 1, 1, 1),
        timestep_conditioning=False,
        patch_size=1,
        patch_size_t=1,
        encoder_causal=True,
        decoder_causal=False,
    )
    return {
        "transformer": shake(transformer, 1),
        "scheduler": FlowMatchEulerDiscreteScheduler(),
        "vae": shake(vae, 2),
        "text_encoder": t5_text(t5, 3),
        "tokenizer": t5,
    }


BUILDERS = {
    "StableDiffusion3Pipeline": stable_diffusion_3,
    "StableDiffusionXLPipeline": stable_diffusion_xl,
    "LTXPipeline": ltx,
    "StableDiffusionPipeline": builders.stable_diffusion,
    "WanVACEPipeline": builders.wan_vace,
}
WITHOUT_TEXT = {
    "DDPMPipeline": builders.ddpm,
    "DDIMPipeline": builders.ddim,
    "DiTPipeline": builders.dit,
    "StableVideoDiffusionPipeline": builders.stable_video_diffusion,
}
OTHERS = {
    "StableDiffusionControlNetPipeline": builders.stable_diffusion_controlnet,
    "LongCatAudioDiTPipeline": builders.longcat_audio_dit,
    "KandinskyV22CombinedPipeline": builders.kandinsky,
}
VIDEO = {"LTXPipeline", "WanVACEPipeline", "StableVideoDiffusionPipeline"}
FIELDS: dict[str, dict[str, Any]] = {
    "StableDiffusion3Pipeline": {"height": 32, "width": 48, "num_inference_steps": 4, "negative_prompt": "blurry"},
    "StableDiffusionXLPipeline": {"height": 32, "width": 48, "num_inference_steps": 4, "negative_prompt": "blurry"},
    "LTXPipeline": {"height": 32, "width": 64, "num_frames": 9, "num_inference_steps": 3},
    "StableDiffusionPipeline": {"height": 32, "width": 48, "num_inference_steps": 4, "negative_prompt": "blurry"},
    "WanVACEPipeline": {"height": 32, "width": 48, "num_frames": 5, "num_inference_steps": 3},
    "DDPMPipeline": {"num_inference_steps": 3},
    "KandinskyV22CombinedPipeline": {
        "height": 64,
        "width": 64,
        "num_inference_steps": 3,
        "prior_num_inference_steps": 2,
    },
    "DDIMPipeline": {"num_inference_steps": 3, "eta": 0.5},
    "DiTPipeline": {"class_labels": [3], "num_inference_steps": 3},
    "StableVideoDiffusionPipeline": {
        "image": Image.linear_gradient("L").resize((96, 64)).convert("RGB"),
        "height": 32,
        "width": 48,
        "num_frames": 3,
        "num_inference_steps": 3,
        "decode_chunk_size": 2,
    },
    "StableDiffusionControlNetPipeline": {
        "image": Image.linear_gradient("L").resize((48, 32)).convert("RGB"),
        "num_inference_steps": 3,
        "controlnet_conditioning_scale": 0.5,
    },
    "LongCatAudioDiTPipeline": {"audio_duration_s": 0.01, "num_inference_steps": 2},
}


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """Return a function that gives the folder of a pipeline's checkpoint."""
    folders = {}

    def of(name):
        if name not in folders:
            torch.manual_seed(0)
            folders[name] = tmp_path_factory.mktemp(name)
            getattr(diffusers, name)(**{**BUILDERS, **WITHOUT_TEXT, **OTHERS}[name](folders[name])).save_pretrained(
                folders[name]
            )
        return folders[name]

    return of
