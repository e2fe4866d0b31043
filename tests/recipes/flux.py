"""Tiny random FLUX.1 checkpoints, and what is asked of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxKontextPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
)
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from safelight.testing.recipes import Case, Recipe, shake
from safelight.testing.tokenizers import clip_tokenizer, t5_tokenizer

CAT = "a photo of a cat sitting on a red chair"
MAP = "an old map of the world, drawn in ink; ships, whales and a compass rose beside the naïve café of 漢字 dogs"

TRANSFORMER_GAINS = {"*.attn.to_out.0.weight": 8.0, "*.attn.norm_*": 2.5}
"""Attention that picks out, and what it picks."""


def components(folder: Path, variant: str) -> dict[str, Any]:
    """Return the components of a pipeline; tokenizers are saved into `folder` on the way."""
    torch.manual_seed(0)
    schnell = variant == "schnell"
    clip = clip_tokenizer(folder / "tokenizer", max_length=16)
    t5 = t5_tokenizer(folder / "tokenizer_2")
    text_config = CLIPTextConfig(
        vocab_size=len(clip),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=16,
        bos_token_id=clip.bos_token_id,
        eos_token_id=clip.eos_token_id,
        pad_token_id=clip.pad_token_id,
    )
    t5_config = T5Config(
        vocab_size=len(t5), d_model=40, d_kv=8, d_ff=48, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu"
    )
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=40,
        pooled_projection_dim=32,
        guidance_embeds=not schnell,
        axes_dims_rope=(4, 6, 6),
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        latent_channels=4,
        norm_num_groups=4,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=0.3611,
        shift_factor=0.1159,
    )
    dynamic = {} if schnell else {"use_dynamic_shifting": True, "shift": 3.0, "max_image_seq_len": 96}
    return {
        "scheduler": FlowMatchEulerDiscreteScheduler(**dynamic),
        "vae": shake(vae, 1),
        "text_encoder": shake(CLIPTextModel(text_config), 2),
        "tokenizer": clip,
        "text_encoder_2": shake(T5EncoderModel(t5_config), 3),
        "tokenizer_2": t5,
        "transformer": shake(transformer, 4, gains=TRANSFORMER_GAINS),
    }


def build(folder: Path, variant: str) -> None:
    """Write a `FluxPipeline` checkpoint."""
    FluxPipeline(**components(folder, variant)).save_pretrained(folder)


def build_kontext(folder: Path, variant: str) -> None:
    """Write a `FluxKontextPipeline` checkpoint."""
    FluxKontextPipeline(**components(folder, variant)).save_pretrained(folder)


def photo(width: int, height: int) -> Image.Image:
    """Return a picture with something at every scale."""
    x = torch.linspace(0, 1, width)[None, :, None]
    y = torch.linspace(0, 1, height)[:, None, None]
    waves = torch.sin(40 * x * y + torch.tensor([0.0, 1.0, 2.0])) * 0.5 + 0.5
    return Image.fromarray((waves * 255).round().to(torch.uint8).numpy())


def patch_resolutions(monkeypatch: Any) -> None:
    """Make Kontext's trained resolutions an eighth, in the reference and here: a megapixel takes long."""
    from diffusers.pipelines.flux import pipeline_flux_kontext

    from safelight.families.flux import config

    smaller = [(w // 8, h // 8) for w, h in pipeline_flux_kontext.PREFERRED_KONTEXT_RESOLUTIONS]
    monkeypatch.setattr(pipeline_flux_kontext, "PREFERRED_KONTEXT_RESOLUTIONS", smaller)
    monkeypatch.setattr(config, "KONTEXT_RESOLUTIONS", tuple(smaller))


ENCODERS = ("text_encoder", "text_encoder_2")
TRUE_CFG = {"negative_prompt": "blurry, low quality", "true_cfg_scale": 3.0}

FLUX = Recipe(
    "FluxPipeline",
    build,
    cases=(
        Case("dev", {"prompt": CAT, "height": 64, "width": 64, "num_inference_steps": 4, "max_sequence_length": 48}),
        Case(
            "dev, 36x100, long prompt",
            {"prompt": MAP, "height": 36, "width": 100, "num_inference_steps": 5, "guidance_scale": 1.7, "seed": 11},
        ),
        Case(
            "dev, true CFG",
            {"prompt": CAT, "height": 68, "width": 44, "num_inference_steps": 4, **TRUE_CFG, "max_sequence_length": 24},
        ),
        Case(
            "dev, second prompts",
            {
                "prompt": CAT,
                "prompt_2": MAP,
                "negative_prompt_2": "dogs",
                "height": 32,
                "width": 52,
                "num_inference_steps": 3,
                **TRUE_CFG,
            },
        ),
        Case(
            "dev, two prompts, n=2",
            {"prompt": [CAT, MAP], "n": 2, "height": 40, "width": 56, "num_inference_steps": 3, "seed": 5},
        ),
        Case("dev, own sigmas", {"prompt": CAT, "height": 32, "width": 32, "sigmas": [1.0, 0.7, 0.3]}),
        Case("dev, empty prompt", {"prompt": "", "height": 32, "width": 32, "num_inference_steps": 2}),
        Case(
            "schnell",
            {"prompt": MAP, "height": 48, "width": 80, "num_inference_steps": 4, "max_sequence_length": 256},
            variant="schnell",
        ),
        Case(
            "schnell, true CFG",
            {"prompt": CAT, "height": 60, "width": 28, "num_inference_steps": 2, **TRUE_CFG, "seed": 3},
            variant="schnell",
        ),
        Case("defaults", {"prompt": CAT, "num_inference_steps": 2}, slow=True),
    ),
    text_encoders=ENCODERS,
)

KONTEXT = Recipe(
    "FluxKontextPipeline",
    build_kontext,
    cases=(
        Case(
            "no image",
            {"prompt": CAT, "height": 64, "width": 64, "max_area": 64 * 64, "num_inference_steps": 4},
        ),
        Case(
            "image resized",
            {"prompt": MAP, "image": photo(150, 90), "max_area": 72 * 72, "num_inference_steps": 4, "seed": 2},
        ),
        Case(
            "image as it is, other aspect",
            {
                "prompt": CAT,
                "image": photo(61, 87),
                "auto_resize": False,
                "height": 300,
                "width": 500,
                "max_area": 5000,
                "num_inference_steps": 3,
            },
        ),
        Case(
            "image, true CFG, n=2",
            {
                "prompt": CAT,
                "image": photo(40, 120),
                "max_area": 48 * 48,
                "num_inference_steps": 3,
                "n": 2,
                "seed": 9,
                **TRUE_CFG,
            },
        ),
    ),
    to_diffusers={"auto_resize": "_auto_resize"},
    patch=patch_resolutions,
    text_encoders=ENCODERS,
)

RECIPES = (FLUX, KONTEXT)
