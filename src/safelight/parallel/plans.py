"""What a model states of how it can be divided: plain tables of its class, read here."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from safelight.attention import Attention
from safelight.parallel.layout import ModelFacts


@dataclass(frozen=True)
class SequencePlan:
    """How the tokens of a model's forward are divided: `_sp_plan` of its class, a table of these names.

    Attributes:
        attention: patterns of the attention layers that need every token.
        rotary: argument with a row for each replicated token, then for each divided one, in the model's order.
        tokens: arguments [B, S, C], each divided along its tokens.
        replicated: argument [B, S, C] whose tokens are on every rank and stand first in attention; "" for none.
        first_block: module whose first argument [B, S, C] is divided, where tokens are made inside; "" for none.
        groups: arguments [B, G] with a value for each of G runs of tokens, of equal length.
        output: module whose result [B, S, C] is gathered; "" is the model itself.

    """

    attention: tuple[str, ...]
    rotary: str
    tokens: tuple[str, ...] = ()
    replicated: str = ""
    first_block: str = ""
    groups: tuple[str, ...] = ()
    output: str = ""


def sequence_plan(module: nn.Module) -> SequencePlan | None:
    """Return a model's plan for its tokens; None where it states none."""
    stated = vars(type(module)).get("_sp_plan")
    return None if stated is None else SequencePlan(**stated)


def tensor_plan(module: nn.Module) -> Mapping[str, Any] | None:
    """Return a model's plan for its weights: patterns of module names to styles; None where it states none."""
    return vars(type(module)).get("_tp_plan")


def matching(module: nn.Module, pattern: str) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules below `module` whose names fit; `*` in a pattern is the index of a block."""
    expression = re.compile(re.escape(pattern).replace(r"\*", r"\d+"))
    for name, submodule in module.named_modules():
        if expression.fullmatch(name):
            yield name, submodule


def model_facts(name: str, transformer: nn.Module | None, num_branches: int, row_parallel_vae: bool) -> ModelFacts:
    """Return what a layout is checked against; the transformer may be on the meta device.

    Args:
        name: of the model.
        transformer: with its plans; None for a model that has none of ours, whose guidance branches alone divide.
        num_branches: guidance branches of a step, at most.
        row_parallel_vae: whether its VAE can be decoded in bands.

    """
    if transformer is None:
        return ModelFacts(name, 1, num_branches, False, False, row_parallel_vae)
    heads = [layer.num_kv_heads for layer in transformer.modules() if isinstance(layer, Attention)]
    return ModelFacts(
        name=name,
        num_heads=math.gcd(*heads),
        num_branches=num_branches,
        tensor_plan=tensor_plan(transformer) is not None,
        sequence_plan=sequence_plan(transformer) is not None,
        row_parallel_vae=row_parallel_vae,
        parameter_bytes=sum(tensor.nbytes for tensor in transformer.parameters()),
    )
