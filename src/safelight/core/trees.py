"""Trees of tensors: what model calls are given and return, and what a request holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor

Tree = Any
"""A tensor, or plain lists, tuples, dicts and dataclasses of trees; anything else in them is a static value."""


def map_tree(value: Tree, change: Callable[[Tensor], Any]) -> Tree:
    """Return a tree with its tensors changed: plain containers and frozen dataclasses are rebuilt.

    A dataclass that is not frozen is somebody's state: it is changed in place, and stays the same object.
    """
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, list):
        return [map_tree(entry, change) for entry in value]
    if type(value) is tuple:
        return tuple(map_tree(entry, change) for entry in value)
    if type(value) is dict:
        return {key: map_tree(entry, change) for key, entry in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        mapped = {name: map_tree(entry, change) for name, entry in vars(value).items()}
        if type(value).__dataclass_params__.frozen:  # type: ignore[attr-defined]
            return dataclasses.replace(value, **mapped)
        vars(value).update(mapped)
    return value


def leaves(value: Tree) -> Iterator[Tensor]:
    """Yield the tensors of a tree, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list) or type(value) is tuple:
        for entry in value:
            yield from leaves(entry)
    elif type(value) is dict:
        yield from leaves(list(value.values()))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from leaves(list(vars(value).values()))


def with_leaves(value: Tree, replacements: Iterable[Any]) -> Tree:
    """Return a tree of the same form, with these in the place of its tensors, in order."""
    following = iter(replacements)
    return map_tree(value, lambda _: next(following))
