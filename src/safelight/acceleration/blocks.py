"""A model's repeated blocks, which its class names in `_repeated_blocks`: what is compiled, and what is streamed."""

from __future__ import annotations

from torch import nn


def repeated_blocks(module: nn.Module) -> list[nn.Module]:
    """Return a module's blocks in the order in which it holds them; empty where its class names none."""
    names: tuple[str, ...] = vars(type(module)).get("_repeated_blocks", ())
    return [part for part in module.modules() if type(part).__name__ in names]


def blocks_by_class(module: nn.Module) -> dict[str, list[nn.Module]]:
    """Return a module's blocks by the names of their classes."""
    classes: dict[str, list[nn.Module]] = {}
    for block in repeated_blocks(module):
        classes.setdefault(type(block).__name__, []).append(block)
    return classes
