"""What a recipe says: how a tiny random checkpoint of a pipeline is built, and what is asked of it."""

from __future__ import annotations

import fnmatch
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
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
        slow: whether its tests are marked `slow`.
        patched: whether the recipe's patch holds.
        unanswered: inputs that change no picture of it, here as in the reference, and why.

    """

    name: str
    fields: Mapping[str, Any]
    variant: str = "default"
    slow: bool = False
    patched: bool = True
    unanswered: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Difference:
    """What the installed reference does otherwise than the model's authors, whose way is ours.

    Attributes:
        sentence: what it is, for the table.
        correct: makes a loaded reference do as the authors do, or leaves it where it does already.
        unlearn: called with pytest's monkeypatch, makes ours do as the installed reference does.

    """

    sentence: str
    correct: Callable[[Any], None]
    unlearn: Callable[[Any], None]


@contextmanager
def references_own_warnings() -> Iterator[None]:
    """Leave what the reference warns of while it is built, loaded or run to its authors: it fails no test of ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


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
        difference: what the installed reference does otherwise than the model's authors.
        silent: fields that change no picture in any case, here as in the reference, and why.
        has_solver: whether the pipeline steps by the solver of its repository.

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
    difference: Difference | None = None
    silent: Mapping[str, str] = field(default_factory=dict)
    has_solver: bool = True

    def write(self, folder: Path, variant: str = "default") -> None:
        """Write the checkpoint of a variant."""
        with references_own_warnings():
            self.build(folder, variant)

    def reference_class(self) -> Any:
        """Return the class whose signature states the defaults."""
        return getattr(diffusers, self.pipeline_name)

    def reference(self, folder: Path, as_installed: bool = False, **kwargs: Any) -> Any:
        """Load the reference: the installed one, with what it does otherwise than the authors put right."""
        load = self.load_reference or self.reference_class().from_pretrained
        with references_own_warnings():
            pipe = load(folder, **kwargs)
        if self.difference is not None and not as_installed:
            self.difference.correct(pipe)
        pipe.set_progress_bar_config(disable=True)
        return pipe


def shake(module: nn.Module, seed: int, scale: float = 0.2, gains: Mapping[str, float] | None = None) -> nn.Module:
    """Move every parameter away from its initial value: norms at 1 and biases at 0 hide mistakes.

    Args:
        module: changed in place.
        seed: of the movement.
        scale: of the movement, in parts of each parameter's own spread.
        gains: factors by patterns of names. Random models hardly answer to what they are given: a mistake moves
            nothing that a comparison could see, unless the ways of text and images into them are made stronger.

    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            spread = scale * max(float(parameter.std()) if parameter.numel() > 1 else 0.0, 0.1)
            parameter.add_(torch.randn(parameter.shape, generator=generator) * spread)
        for pattern, gain in (gains or {}).items():
            matching = [tensor for name, tensor in module.named_parameters() if fnmatch.fnmatch(name, pattern)]
            assert matching, f"no parameter is named {pattern}"
            for parameter in matching:
                parameter.mul_(gain)
    return module.eval()
