"""Small configurations of the classes that keep parts of themselves in float32, as the installed package has them."""

from __future__ import annotations

import inspect
from typing import Any

import diffusers
import torch
from diffusers import ModelMixin

SMALL: dict[str, Any] = {
    "attention_head_dim": 24,
    "ffn_dim": 32,
    "freq_dim": 16,
    "in_channels": 4,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "num_key_value_heads": 2,
    "num_layers": 1,
    "out_channels": 4,
    "text_dim": 16,
    "vocab_size": 32,
}
"""By a parameter's name, for every class that has it."""
OWN: dict[str, dict[str, Any]] = {
    "Cosmos3OmniTransformer": {"hidden_size": 32, "head_dim": 16, "intermediate_size": 32, "latent_channel": 4}
    | {"patch_latent_dim": 16},
    "CosmosControlNetModel": {"n_controlnet_blocks": 1, "model_channels": 48, "latent_channels": 4}
    | {"text_embed_dim": 16, "adaln_lora_dim": 8, "crossattn_proj_in_channels": 16}
    | {"encoder_hidden_states_channels": 16, "img_context_dim_out": 16}
    | {"extra_pos_embed_type": "learnable"},
    "JoyImageEditPlusTransformer3DModel": {"hidden_size": 32, "rope_dim_list": [4, 6, 6]},
    "JoyImageEditTransformer3DModel": {"hidden_size": 32, "rope_dim_list": [4, 6, 6]},
    "Kandinsky5Transformer3DModel": {"in_text_dim": 16, "in_text_dim2": 16, "time_dim": 16, "model_dim": 48}
    | {"ff_dim": 32, "num_text_blocks": 1, "num_visual_blocks": 1, "axes_dims": (4, 10, 10)},
    "Kandinsky6SRTransformer3DModel": {"in_visual_dim": 4, "out_visual_dim": 4, "time_dim": 16, "model_dim": 48}
    | {"ff_dim": 32, "num_visual_blocks": 1, "axes_dims": (4, 10, 10)},
    "Kandinsky6Transformer3DModel": {"in_visual_dim": 4, "out_visual_dim": 4, "in_text_dim": 16, "in_text_dim2": 16}
    | {"time_dim": 16, "model_dim": 48, "ff_dim": 32, "num_text_blocks": 1, "num_visual_blocks": 1}
    | {"axes_dims": (4, 10, 10), "in_audio_dim": 4, "out_audio_dim": 4},
    "Krea2Transformer2DModel": {"attention_head_dim": 16, "intermediate_size": 32, "timestep_embed_dim": 16}
    | {"text_hidden_dim": 32, "num_text_layers": 2, "text_num_attention_heads": 2, "text_num_key_value_heads": 2}
    | {"text_intermediate_size": 32, "num_layerwise_text_blocks": 1, "num_refiner_text_blocks": 1}
    | {"axes_dims_rope": (4, 6, 6)},
    "MiniMaxH3Transformer3DModel": {"hidden_size": 48, "num_refiner_layers": 1, "audio_in_channels": 4}
    | {"time_embed_hidden_dim": 16, "time_embed_dim": 8},
    "WanAnimate2Transformer3DModel": {"in_dim": 8, "dim": 48, "out_dim": 4, "num_heads": 2},
    "WanVACETransformer3DModel": {"num_layers": 2, "vace_layers": [0], "vace_in_channels": 8},
}
TOO_LARGE = {
    "AutoencoderKLMiniMaxH3": "widths and depths that its configuration does not set",
    "AutoencoderKLMiniMaxH3Audio": "likewise",
    "RFD4ProteinaAutoencoder": "proteins: of no pipeline that makes pictures",
    "RFD4ProteinaTransformer": "likewise",
    "WanAnimateTransformer3DModel": "an encoder of motion at its full width",
}
"""Classes that cannot be made small, and why. They go the same way as the others."""


def classes() -> list[str]:
    """Return the names of the public model classes with parts in float32."""
    public: list[Any] = [getattr(diffusers, name, None) for name in dir(diffusers)]
    return sorted(
        {
            cls.__name__
            for cls in public
            if isinstance(cls, type) and issubclass(cls, ModelMixin) and getattr(cls, "_keep_in_fp32_modules", None)
        }
    )


def build(name: str) -> torch.nn.Module:
    """Return a small model of a class."""
    cls = getattr(diffusers, name)
    parameters = inspect.signature(cls.__init__).parameters
    small = {key: value for key, value in {**SMALL, **OWN.get(name, {})}.items() if key in parameters}
    torch.manual_seed(0)
    made: torch.nn.Module = cls(**small)
    return made
