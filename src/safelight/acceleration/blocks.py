"""A module's repeated blocks: what is compiled, and what is streamed. Its class names them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn


def repeated_blocks(module: nn.Module) -> list[nn.Module]:
    """Return a module's blocks in the order in which it holds them; empty where its class names none.

    They are of the classes in `_repeated_blocks`; where a library's class has no such table, of those in its
    `_no_split_modules`, which are not to be divided among devices, as far as they stand in lists. Of blocks within each
    other the outer ones.
    """
    repeated, undivided = (_named(module, table) for table in ("_repeated_blocks", "_no_split_modules"))
    if repeated:
        return list(_outermost(module, lambda _, part: type(part).__name__ in repeated))
    return list(
        _outermost(module, lambda parent, part: isinstance(parent, nn.ModuleList) and type(part).__name__ in undivided)
    )


def _named(module: nn.Module, table: str) -> frozenset[str]:
    """Return the names in a table of a module's class; of those of its bases the nearest that has any."""
    found = (vars(base).get(table) for base in type(module).__mro__)
    return frozenset(next((names for names in found if names), ()))


def _outermost(parent: nn.Module, is_block: Callable[[nn.Module, nn.Module], bool]) -> Iterator[nn.Module]:
    for part in parent.children():
        if is_block(parent, part):
            yield part
        else:
            yield from _outermost(part, is_block)


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
