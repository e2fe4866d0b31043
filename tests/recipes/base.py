"""What a recipe says, and what recipes share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
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
        patched: whether the recipe's patch holds.
    """

    name: str
    fields: Mapping[str, Any]
    variant: str = "default"
    slow: bool = False
    patched: bool = True


def square_default(pipe: Any) -> tuple[int, int]:
    """Return the default size of a Diffusers pipeline that has `default_sample_size`."""
    side = pipe.default_sample_size * pipe.vae_scale_factor
    return side, side


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
        text_encoders: whose token ids are compared; with dots where a part of a component is meant.
        load_reference: loads the reference from a folder; Diffusers' class of the same name unless given.
        default_size: the reference's (height, width), given the reference.
        one_at_a_time: whether the reference is called once an output, because it takes no list of prompts.
    """

    pipeline_name: str
    build: Callable[[Path, str], None]
    cases: tuple[Case, ...]
    to_diffusers: Mapping[str, str] = field(default_factory=dict)
    patch: Callable[[Any], None] | None = None
    not_in_signature: frozenset[str] = frozenset({"height", "width"})
    text_encoders: tuple[str, ...] = ("text_encoder",)
    load_reference: Callable[..., Any] | None = None
    default_size: Callable[[Any], tuple[int | None, int | None]] = square_default
    one_at_a_time: bool = False

    def reference_class(self) -> Any:
        """Return the class whose signature states the defaults."""
        return getattr(diffusers, self.pipeline_name)

    def reference(self, folder: Path, **kwargs: Any) -> Any:
        """Load the reference."""
        load = self.load_reference or self.reference_class().from_pretrained
        pipe = load(folder, **kwargs)
        pipe.set_progress_bar_config(disable=True)
        return pipe


def shake(module: nn.Module, seed: int, scale: float = 0.2) -> nn.Module:
    """Move every parameter away from its initial value: norms at 1 and biases at 0 hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            spread = scale * max(float(parameter.std()) if parameter.numel() > 1 else 0.0, 0.1)
            parameter.add_(torch.randn(parameter.shape, generator=generator) * spread)
    return module.eval()
