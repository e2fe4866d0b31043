"""What a recipe says, and what recipes share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Case:
    """One call, in Safelight's words; the suite translates it for Diffusers.

    Attributes:
        name: short, for the table.
        fields: sampling parameters.
        variant: which of the recipe's checkpoints it runs on.
        slow: whether it runs in `make test-all` only.
    """

    name: str
    fields: Mapping[str, Any]
    variant: str = "default"
    slow: bool = False


@dataclass(frozen=True)
class Recipe:
    """How to build a pipeline's tiny checkpoint with Diffusers, and what to ask of it.

    Attributes:
        pipeline_name: class name in Diffusers.
        build: writes the checkpoint of a variant into a folder.
        cases: what is compared.
        to_diffusers: our field names to those of the Diffusers pipeline, where they differ.
        patch: called with pytest's monkeypatch before a case, for constants of the reference.
        not_in_signature: our defaults that Diffusers computes from the model instead of stating.
        token_inputs: text encoders whose token ids are compared.
    """

    pipeline_name: str
    build: Callable[[Path, str], None]
    cases: tuple[Case, ...]
    to_diffusers: Mapping[str, str] = field(default_factory=dict)
    patch: Callable[[Any], None] | None = None
    not_in_signature: frozenset[str] = frozenset({"height", "width"})
    text_encoders: tuple[str, ...] = ("text_encoder",)


def shake(module: nn.Module, seed: int, scale: float = 0.2) -> nn.Module:
    """Move every parameter away from its initial value: norms at 1 and biases at 0 hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            spread = scale * max(float(parameter.std()) if parameter.numel() > 1 else 0.0, 0.1)
            parameter.add_(torch.randn(parameter.shape, generator=generator) * spread)
    return module.eval()
