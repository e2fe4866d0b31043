"""Tiny encoders of text and of pictures, of any class of transformers, and tokenizers and processors for them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CLIPImageProcessorPil, PreTrainedModel

from safelight.testing.recipes import shake
from safelight.testing.tokenizers import clip_tokenizer, qwen2_tokenizer, t5_tokenizer

MAX_LENGTH = 16
"""Tokens of a prompt for CLIP."""
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}{{ part['text'] if part['type'] == 'text' else '<|image_pad|>' }}"
    "{% endfor %}{% endif %}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
"""Of a chat, for the pipelines that ask in one."""
SIZES: Mapping[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "projection_dim", "out_hidden_size", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("intermediate_size", "d_ff", "ffn_dim"), 48),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "depth"), 2),
    **dict.fromkeys(("num_attention_heads", "num_heads"), 4),
    **dict.fromkeys(("d_kv", "head_dim"), 8),
    **dict.fromkeys(("query_pre_attn_scalar",), 8),
    "num_key_value_heads": 2,
}
"""By a setting's name, for every configuration that has it."""
QWEN_VL = {
    "text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [1, 1, 2]}},
    "vision_config": {"fullatt_block_indexes": [1], "window_size": 56},
}
"""What Qwen's encoders of texts with pictures have beside."""
PICTURES = {"image_size": 30, "patch_size": 15}
"""For CLIP's encoders of pictures, and their processors."""
BYTES_OF_T5 = 259
"""Tokens of a tokenizer of bytes."""


def configuration(cls: Any, sizes: Mapping[str, Any], own: Mapping[str, Any]) -> Any:
    """Return a configuration of a class: its defaults, with the sizes that it knows, those of its parts too."""
    default = cls()
    parts = {
        name: {**configuration(type(vars(default)[name]), sizes, own.get(name, {})).to_dict()}
        for name in cls.sub_configs
        if name in vars(default) and isinstance(vars(default)[name], transformers.PreTrainedConfig)
    }
    known = {name: value for name, value in sizes.items() if name in vars(default) and vars(default)[name] is not None}
    return cls(**{**known, **parts, **{name: value for name, value in own.items() if name not in parts}})


def encoder(cls: type[PreTrainedModel], tokenizer: Any, seed: int, own: Mapping[str, Any]) -> PreTrainedModel:
    """Return a tiny random encoder.

    Args:
        cls: of transformers.
        tokenizer: whose tokens it knows; None for pictures.
        seed: of its weights.
        own: settings that the vocabulary does not have, or has otherwise.

    """
    torch.manual_seed(seed)
    sizes = dict(SIZES)
    if tokenizer is None:
        sizes.update(PICTURES)
    else:
        special = {name: vars_of(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        sizes |= {"vocab_size": len(tokenizer), **{key: each for key, each in special.items() if each is not None}}
    if cls.__name__.startswith("CLIPText"):
        sizes["max_position_embeddings"] = MAX_LENGTH
    return shake(cls(configuration(cls.config_class, sizes, own)), seed)


def vars_of(tokenizer: Any, name: str) -> int | None:
    """Return the number of a special token; None where there is none."""
    found: int | None = getattr(tokenizer, name, None)
    return found


def tokenizer(cls: type, folder: Path) -> Any:
    """Return a tokenizer of the kind of a class: CLIP's, T5's, or one of bytes in pairs for all that chat."""
    if "CLIP" in cls.__name__:
        return clip_tokenizer(folder, MAX_LENGTH)
    if cls.__name__ in ("T5Tokenizer", "BertTokenizer", "XLMRobertaTokenizer"):
        made = t5_tokenizer(folder)
        made.model_max_length = MAX_LENGTH
        return made
    if cls.__name__ == "ByT5Tokenizer":
        return transformers.ByT5Tokenizer()
    made = qwen2_tokenizer(folder)
    made.chat_template = TEMPLATE
    return made


def processor(cls: Any) -> Any:
    """Return a processor of pictures; CLIP's at the size of its tiny encoders."""
    if cls is CLIPImageProcessorPil:
        side = PICTURES["image_size"]
        return cls(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    return cls()
