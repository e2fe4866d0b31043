"""What the layered pipeline's text encoder does: it embeds texts without its head, and writes captions with it."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.generation import GenerateDecoderOnlyOutput

from safelight.core.trees import Tree
from safelight.stages.encoders import encode_text


def cache_name(output_cls: type) -> str:
    """Return what `generate` calls its keys and values, as an argument and in its output: 5.24 renamed them."""
    names = {field.name for field in dataclasses.fields(output_cls)}
    return "cache" if "cache" in names else "past_key_values"


CACHE = cache_name(GenerateDecoderOnlyOutput)


def encode_headless(text_encoder: Any, output: str, **inputs: Tensor) -> Tensor:
    """Return an output of the text encoder without its head, [B, S, C]."""
    return encode_text(text_encoder.model, output, **inputs)


def write_tokens(
    text_encoder: Any, ids: Tensor, num_tokens: int, positions: Tensor | None, cache: Tree, **image: Tensor
) -> dict[str, Tree]:
    """Return the ids [1, S] with those that follow, so many at most, chosen greedily; their positions, and the cache.

    Positions are always given, or the text encoder would take those of whichever image it saw last.

    Args:
        text_encoder: with its head.
        ids: [1, S].
        num_tokens: that are written at most.
        positions: [4, 1, S], the token's number, then its time, row and column; None to find them by the image.
        cache: keys and values [1, H, S, D], a pair a layer; empty at first.
        image: of the first call: its patches, their grid, and what says where they are.

    """
    if positions is None:
        seen = {name: image.pop(name) for name in list(image) if name not in ("pixel_values", "image_grid_thw")}
        places, _ = text_encoder.model.get_rope_index(ids, image_grid_thw=image["image_grid_thw"], **seen)  # [3, 1, S]
        positions = torch.cat((torch.arange(ids.shape[1], device=ids.device).expand(1, 1, -1), places))
    made = text_encoder.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        position_ids=positions,
        max_new_tokens=num_tokens,
        do_sample=False,
        return_dict_in_generate=True,
        **{CACHE: DynamicCache(tuple(pair) for pair in cache)},
        **image,
    )
    written = made["sequences"].shape[1] - ids.shape[1]
    following = positions[..., -1:] + torch.arange(1, written + 1, device=ids.device)
    return {
        "ids": made["sequences"],
        "positions": torch.cat((positions, following), dim=-1),
        "cache": [(layer.keys, layer.values) for layer in made[CACHE].layers],
    }
