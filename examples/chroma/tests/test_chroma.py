"""Chroma is held to Diffusers, and to everything else that a family promises."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, ChromaPipeline, ChromaTransformer2DModel, FlowMatchEulerDiscreteScheduler
from transformers import T5Config, T5EncoderModel

from safelight.testing.recipes import Case, Recipe, shake
from safelight.testing.suites import FamilySuite
from safelight.testing.tokenizers import t5_tokenizer

CAT = "a photo of a cat sitting on a red chair"
MAP = "an old map of the world, drawn in ink; ships, whales and a compass rose beside the naïve café of 漢字 dogs"
SMALL = {"height": 36, "width": 52, "num_inference_steps": 3}
GAINS = {"*.attn.to_out.0.weight": 3.0, "*.attn.norm_*": 1.5}
"""Attention that picks out, and what it picks."""


def build(folder: Path, variant: str) -> None:
    """Write a tiny checkpoint."""
    torch.manual_seed(0)
    tokenizer = t5_tokenizer(folder / "tokenizer")
    t5 = T5Config(
        vocab_size=len(tokenizer),
        d_model=40,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
    )
    transformer = ChromaTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=40,
        axes_dims_rope=(4, 6, 6),
        approximator_num_channels=16,
        approximator_hidden_dim=24,
        approximator_layers=2,
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
    ChromaPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0, max_image_seq_len=96),
        vae=shake(vae, 1),
        text_encoder=shake(T5EncoderModel(t5), 3),
        tokenizer=tokenizer,
        transformer=shake(transformer, 4, gains=GAINS),
    ).save_pretrained(folder)


CHROMA = Recipe(
    "ChromaPipeline",
    build,
    cases=(
        Case("guided", {"prompt": CAT, **SMALL, "negative_prompt": "blurry", "max_sequence_length": 48}),
        Case("no guidance, cut", {"prompt": MAP, **SMALL, "guidance_scale": 1.0, "max_sequence_length": 16}),
        Case("64x40, no negative prompt", {"prompt": MAP, **SMALL, "height": 64, "width": 40, "seed": 11}),
        Case("two prompts, n=2", {"prompt": [CAT, MAP], "n": 2, **SMALL, "seed": 5, "max_sequence_length": 64}),
        Case("empty prompt", {"prompt": "", **SMALL, "negative_prompt": MAP, "max_sequence_length": 32}),
        Case("own sigmas", {"prompt": CAT, "height": 32, "width": 32, "sigmas": [1.0, 0.7, 0.3]}),
    ),
)


class TestChroma(FamilySuite):
    recipes = (CHROMA,)
