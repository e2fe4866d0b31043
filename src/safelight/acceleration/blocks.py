"""A model's repeated blocks, which its class names in `_repeated_blocks`: what is compiled, and what is streamed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

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


@contextmanager
def one_block_each(module: nn.Module) -> Iterator[None]:
    """Leave a module one block of each list, for one call: the other blocks have the same graphs."""
    names = blocks_by_class(module)
    lists = [
        (parent, key, child)
        for parent in module.modules()
        for key, child in parent.named_children()
        if isinstance(child, nn.ModuleList) and len(child) and type(child[0]).__name__ in names
    ]
    for parent, key, child in lists:
        parent.register_module(key, child[:1])
    try:
        yield
    finally:
        for parent, key, child in lists:
            parent.register_module(key, child)
