"""Tiny networks of any class: its own defaults, with sizes of one small vocabulary, so that components agree."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from safelight.testing.recipes import shake

WIDTH = 32
"""Of every stream and every embedding: two heads of 16. What two components must agree on is this."""
LATENTS = 4
"""Channels of every VAE's latents; packed two by two they are 16."""

SIZES: Mapping[str, Any] = {
    **dict.fromkeys(
        (
            "joint_attention_dim",
            "cross_attention_dim",
            "cross_attention_dim_t5",
            "cross_attention_input_dim",
            "cross_attn_dim",
            "caption_channels",
            "caption_projection_dim",
            "pooled_projection_dim",
            "text_embed_dim",
            "text_embed_2_dim",
            "text_emb_dim",
            "text_dim",
            "text_encoder_dim",
            "in_text_dim",
            "in_text_dim2",
            "image_embed_dim",
            "image_proj_dim",
            "context_in_dim",
            "cap_feat_dim",
            "hidden_size",
            "encoder_hidden_size",
            "cond_embed_dim",
            "embedding_dim",
            "model_dim",
            "dim",
            "time_embed_dim",
            "time_dim",
            "conditioning_dim",
            "crossattn_proj_in_channels",
            "encoder_hidden_states_channels",
            "encoder_hid_dim",
        ),
        WIDTH,
    ),
    **dict.fromkeys(("in_channels", "out_channels", "in_visual_dim", "out_visual_dim", "latent_channels"), LATENTS),
    **dict.fromkeys(("num_attention_heads", "num_heads", "n_heads", "n_kv_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("num_key_value_heads", "num_cross_attention_heads", "num_key_value_attention_heads"), 2),
    **dict.fromkeys(("attention_head_dim", "cross_attention_head_dim", "head_dim"), 16),
    **dict.fromkeys(("num_layers", "n_layers", "num_visual_blocks", "depth", "num_hidden_layers"), 2),
    **dict.fromkeys(("num_single_layers", "num_refiner_layers", "n_refiner_layers", "num_text_blocks"), 1),
    **dict.fromkeys(("ffn_dim", "ff_dim", "intermediate_size"), 48),
    **dict.fromkeys(("freq_dim", "timestep_guidance_channels", "adaln_lora_dim", "condition_dim"), 16),
    **dict.fromkeys(("axes_dims_rope", "rope_axes_dim", "axes_dims", "axes_dim_rope"), (4, 6, 6)),
    **dict.fromkeys(("rope_max_seq_len", "pos_embed_max_size"), 64),
    **dict.fromkeys(("sample_width", "sample_height", "sample_size"), 16),
}
"""By a parameter's name, for every class that has it."""
PACKED = (
    "FluxTransformer2DModel",
    "FluxControlNetModel",
    "ChromaTransformer2DModel",
    "BriaTransformer2DModel",
)
"""Transformers of latents packed two by two."""
KL = {
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "shift_factor": 0.06,
}
WAN = {"base_dim": 4, "z_dim": LATENTS, "num_res_blocks": 1, "in_channels": 3, "out_channels": 3}
MEANS = {"latents_mean": [0.1, -0.1, 0.2, 0.0], "latents_std": [1.1, 0.9, 1.3, 0.8]}
UNET = {
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 4,
    "num_attention_heads": None,  # they mistake the one for the other
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}
MOTION = {
    "block_out_channels": (8, 16),
    "motion_max_seq_length": 8,
    "motion_num_attention_heads": 2,
    "norm_num_groups": 4,
    "motion_norm_num_groups": 4,
    "motion_layers_per_block": 1,
}
OF_CLASS: dict[str, dict[str, Any]] = {
    "AutoencoderKL": KL,
    "AutoencoderKLFlux2": {**KL, "latent_channels": 4},
    "AutoencoderKLTemporalDecoder": {
        **KL,
        "block_out_channels": (32, 32),
    },
    "AutoencoderKLWan": {**WAN, **MEANS, "dim_mult": [1, 2, 2, 2]},
    "AutoencoderKLQwenImage": {
        **WAN,
        "z_dim": 6,  # at 4 the pipelines take pictures with an alpha channel for latents
        "latents_mean": [0.1, -0.1, 0.2, 0.0, 0.3, -0.2],
        "latents_std": [1.1, 0.9, 1.3, 0.8, 1.2, 1.0],
        "input_channels": 3,
    },
    "AutoencoderDC": {
        "in_channels": 3,
        "latent_channels": LATENTS,
        "attention_head_dim": 4,
        "encoder_block_types": ("ResBlock", "EfficientViTBlock"),
        "decoder_block_types": ("ResBlock", "EfficientViTBlock"),
        "encoder_block_out_channels": (8, 8),
        "decoder_block_out_channels": (8, 8),
        "encoder_qkv_multiscales": ((), (5,)),
        "decoder_qkv_multiscales": ((), (5,)),
        "encoder_layers_per_block": (1, 1),
        "decoder_layers_per_block": (1, 1),
        "downsample_block_type": "conv",
        "upsample_block_type": "interpolate",
        "decoder_norm_types": "rms_norm",
        "decoder_act_fns": "silu",
        "scaling_factor": 0.41407,
    },
    "AutoencoderKLHunyuanVideo": {
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": (8, 8, 8, 8),
        "layers_per_block": 1,
        "norm_num_groups": 4,
    },
    "AutoencoderKLHunyuanVideo15": {
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": (16, 16),
        "layers_per_block": 1,
        "spatial_compression_ratio": 4,
        "temporal_compression_ratio": 2,
    },
    "AutoencoderKLHunyuanImage": {
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": (32, 64, 64),
        "layers_per_block": 1,
        "latent_channels": 4,
        "sample_size": 32,
        "spatial_compression_ratio": 4,
        "scaling_factor": 0.5,
    },
    "AutoencoderKLLTXVideo": {
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": 8,
        "block_out_channels": (8, 8, 8, 8),
        "decoder_block_out_channels": (8, 8, 8, 8),
        "layers_per_block": (1, 1, 1, 1, 1),
        "decoder_layers_per_block": (1, 1, 1, 1, 1),
        "spatio_temporal_scaling": (True, True, False, False),
        "decoder_spatio_temporal_scaling": (True, True, False, False),
        "patch_size": 1,
        "timestep_conditioning": False,
        "encoder_causal": True,
        "decoder_causal": False,
    },
    "AutoencoderKLLTX2Video": {
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": (8,),
        "decoder_block_out_channels": (8,),
        "layers_per_block": (1,),
        "decoder_layers_per_block": (1, 1),
        "spatio_temporal_scaling": (True,),
        "decoder_spatio_temporal_scaling": (True,),
        "decoder_inject_noise": (False, False),
        "downsample_type": ("spatial",),
        "upsample_residual": (False,),
        "upsample_factor": (1,),
        "timestep_conditioning": False,
        "patch_size": 1,
        "encoder_causal": True,
        "decoder_causal": False,
    },
    "LTX2VideoTransformer3DModel": {
        "audio_in_channels": 8,
        "audio_out_channels": 8,
        "audio_num_attention_heads": 2,
        "audio_attention_head_dim": 16,
        "audio_cross_attention_dim": WIDTH,
    },
    "LTX2TextConnectors": {
        **dict.fromkeys(("video_connector_num_attention_heads", "audio_connector_num_attention_heads"), 2),
        **dict.fromkeys(("video_connector_attention_head_dim", "audio_connector_attention_head_dim"), 16),
        **dict.fromkeys(("video_connector_num_layers", "audio_connector_num_layers"), 1),
        **dict.fromkeys(("video_connector_num_learnable_registers", "audio_connector_num_learnable_registers"), None),
        "text_proj_in_factor": 3,  # hidden states of a text encoder of two layers
    },
    "AutoencoderKLLTX2Audio": {
        "base_channels": 8,
        "in_channels": 2,
        "output_channels": 2,
        "ch_mult": (1,),
        "num_res_blocks": 1,
        "resolution": 32,
        "latent_channels": 2,
        "mel_bins": 16,
    },
    "LTX2Vocoder": {
        "in_channels": 2 * 16,
        "hidden_channels": 32,
        "out_channels": 2,
        "upsample_kernel_sizes": [4, 4],
        "upsample_factors": [2, 2],
        "resnet_kernel_sizes": [3],
        "resnet_dilations": [[1, 3]],
    },
    "AutoencoderKLCogVideoX": {
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": (8, 8, 8, 8),
        "layers_per_block": 1,
        "norm_num_groups": 2,
    },
    "CogVideoXTransformer3DModel": {
        "sample_width": 6,
        "sample_height": 4,
        "sample_frames": 9,
        "max_text_seq_length": 16,
    },
    "ConsisIDTransformer3DModel": {"sample_width": 6, "sample_height": 4, "max_text_seq_length": 16},
    "CogView3PlusTransformer2DModel": {"condition_dim": 2, "pos_embed_max_size": 24},
    "CogView4Transformer2DModel": {"condition_dim": 2, "pos_embed_max_size": 24, "rope_axes_dim": (16, 16)},
    "AutoencoderKLMochi": {
        "latent_channels": 4,
        "encoder_block_out_channels": (32, 32, 32, 32),
        "decoder_block_out_channels": (32, 32, 32, 32),
        "layers_per_block": (1, 1, 1, 1, 1),
        "in_channels": 15,
        "out_channels": 3,
        "latents_mean": None,
        "latents_std": None,
    },
    "MochiTransformer3DModel": {"max_sequence_length": 16},
    "AutoencoderKLAllegro": {
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": (8, 8, 8, 8),
        "layers_per_block": 1,
        "norm_num_groups": 2,
    },
    "AllegroTransformer3DModel": {"attention_head_dim": 24, "cross_attention_dim": 48},
    "AutoencoderKLMagvit": {
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": (8, 8, 8, 8),
        "layers_per_block": 1,
        "norm_num_groups": 2,
    },
    "AutoencoderKLCosmos": {
        "in_channels": 3,
        "out_channels": 3,
        "encoder_block_out_channels": (8, 8, 8, 8),
        "decode_block_out_channels": (8, 8, 8, 8),
        "attention_resolutions": (8,),
        "resolution": 64,
        "num_layers": 1,
    },
    "CosmosTransformer3DModel": {"in_channels": 4 + 1, "max_size": (4, 32, 32), "rope_scale": (2.0, 1.0, 1.0)},
    "VQModel": {**KL, "latent_channels": 4, "num_vq_embeddings": 16},
    "AutoencoderOobleck": {
        "encoder_hidden_size": 8,
        "downsampling_ratios": [1, 2],
        "decoder_channels": 8,
        "decoder_input_channels": 4,
        "channel_multiples": [2, 4],
        "sampling_rate": 8000,
    },
    "StableAudioDiTModel": {"in_channels": 4, "out_channels": 4, "time_proj_dim": 8, "global_states_input_dim": 64}
    | {"cross_attention_input_dim": 32, "sample_size": 64},
    "StableAudioProjectionModel": {"text_encoder_dim": 32, "conditioning_dim": 32, "min_value": 0, "max_value": 32},
    "UNet2DConditionModel": UNET,
    "ControlNetModel": {**UNET, "conditioning_embedding_out_channels": (8, 8)},
    "UNetMotionModel": {
        **UNET,
        **MOTION,
        "num_attention_heads": 2,
        "down_block_types": ("DownBlockMotion", "CrossAttnDownBlockMotion"),
        "up_block_types": ("CrossAttnUpBlockMotion", "UpBlockMotion"),
    },
    "MotionAdapter": MOTION,
    "UNet2DModel": {
        **UNET,
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    },
    "T2IAdapter": {"in_channels": 3, "channels": [8, 16], "num_res_blocks": 1, "downscale_factor": 2},
    "UNetSpatioTemporalConditionModel": {
        "in_channels": 8,
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 24,
    },
    "LatteTransformer3DModel": {"patch_size": 2, "out_channels": 8, "num_embeds_ada_norm": 1000, "video_length": 5}
    | {"norm_type": "ada_norm_single", "activation_fn": "gelu-approximate"},
    "HunyuanDiT2DModel": {"patch_size": 2, "text_len": 77, "text_len_t5": 256},
    "LuminaNextDiT2DModel": {"num_kv_heads": 2, "multiple_of": 16, "sample_size": 16},
    "Lumina2Transformer2DModel": {"multiple_of": 16, "axes_lens": (300, 64, 64)},
    "ZImageTransformer2DModel": {"axes_dims": [4, 6, 6], "axes_lens": [512, 64, 64]},
    "OmniGenTransformer2DModel": {"time_step_dim": 16},
    "AuraFlowTransformer2DModel": {"num_mmdit_layers": 1, "num_single_dit_layers": 1, "pos_embed_max_size": 256},
    "HiDreamImageTransformer2DModel": {
        "patch_size": 2,
        "caption_channels": [32, 32],
        "axes_dims_rope": (4, 6, 6),
        "max_resolution": (128, 128),
        "llama_layers": (0, 1, 1),
        "text_emb_dim": 64,
        "num_routed_experts": 2,
    },
    "Kandinsky3UNet": {
        "groups": 4,
        "attention_head_dim": 4,
        "layers_per_block": 3,
        "block_out_channels": (8, 16),
        "time_embedding_dim": 4,
    },
    "Kandinsky5Transformer3DModel": {"axes_dims": (4, 6, 6), "model_dim": 32},
    "Flux2Transformer2DModel": {
        "in_channels": 4 * LATENTS,
        "out_channels": None,
        "axes_dims_rope": (4, 4, 4, 4),
        "joint_attention_dim": 3 * WIDTH,
    },
    "OvisImageTransformer2DModel": {"in_channels": 4 * LATENTS, "out_channels": 4 * LATENTS},
    "QwenImageTransformer2DModel": {"in_channels": 24, "out_channels": 6, "axes_dims_rope": (4, 6, 6)},
    "QwenImageControlNetModel": {"in_channels": 24, "out_channels": 6, "num_layers": 1},
    "PRXTransformer2DModel": {"axes_dim": [8, 8]},
    "HunyuanImageTransformer2DModel": {"rope_axes_dim": (8, 8)},
    "DiTTransformer2DModel": {"patch_size": 2, "out_channels": 8, "sample_size": 8, "num_embeds_ada_norm": 1000},
    "SD3ControlNetModel": {"num_layers": 1, "pos_embed_max_size": 24},
    "SD3Transformer2DModel": {"pos_embed_max_size": 24},
    "PixArtTransformer2DModel": {"out_channels": 8},
    **{name: {"in_channels": 4 * LATENTS, "out_channels": None} for name in PACKED},
    "UVit2DModel": {
        "vocab_size": 32,
        "codebook_size": 16,
        "micro_cond_encode_dim": 2,
        "micro_cond_embed_dim": 10,
        "in_channels": 32,
        "block_out_channels": 32,
        "num_res_blocks": 1,
        "block_num_heads": 1,
    },
    "PriorTransformer": {"num_embeddings": 16},
}
"""What a class needs beside: blocks by type, and channels that are pictures'."""
OF_CLASS["ChromaTransformer2DModel"] |= {
    "approximator_num_channels": 8,
    "approximator_hidden_dim": 32,
    "approximator_layers": 1,
}


GAINS: Mapping[str, Mapping[str, float]] = {
    "AuraFlowTransformer2DModel": {
        "context_embedder.weight": 10.0,
        "*attn.add_v_proj.weight": 10.0,
        "*attn.to_*.weight": 5.0,
    },
    "FluxTransformer2DModel": {"*attn.to_v.weight": 4.0},
    "Flux2Transformer2DModel": {"context_embedder.weight": 5.0},
}
"""What is made stronger in networks that hardly answer to their inputs otherwise."""


def network(cls: type[nn.Module], seed: int, own: Mapping[str, Any]) -> nn.Module:
    """Return a tiny random network, every parameter moved away from its initial value.

    Args:
        cls: of the diffusers package.
        seed: of its weights.
        own: arguments that the vocabulary does not have, or has otherwise.

    """
    torch.manual_seed(seed)
    taken = inspect.signature(cls.__init__).parameters
    sizes = {**SIZES, **OF_CLASS.get(cls.__name__, {})}
    arguments = {name: value for name, value in sizes.items() if name in taken}
    made = cls(**{**arguments, **own})
    begin_at_random(made)
    return shake(made, seed, gains=GAINS.get(cls.__name__, {}))


def begin_at_random(module: nn.Module) -> None:
    """Fill what training begins at zero: ways through which an input would move nothing yet."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1 and not parameter.any():
                parameter.normal_(std=parameter[0].numel() ** -0.5)
