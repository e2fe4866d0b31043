"""Tiny checkpoints of the recipes whose transformers have four heads, so that they divide."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers

from safelight.testing.recipes import Recipe, shake

NUM_HEADS = 4


def build(recipe: Recipe, variant: str, folder: Path, **changes: Any) -> Path:
    """Write the checkpoint of a recipe's variant, with other transformers, and further changes of their configs."""
    recipe.build(folder, variant)
    for config in sorted(folder.glob("transformer*/config.json")):
        values = json.loads(config.read_text())
        cls: Any = vars(diffusers)[values["_class_name"]]
        wider = {"num_attention_heads": NUM_HEADS, **changes}
        if values.get("added_kv_proj_dim") is not None:
            wider["added_kv_proj_dim"] = NUM_HEADS * values["attention_head_dim"]
        made: Any = cls.from_config({**values, **wider})
        shake(made, 7 + len(config.parent.name))
        made.save_pretrained(config.parent)
    return folder
