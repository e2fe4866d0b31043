"""What the package's networks are given and return: trees, the libraries' own classes of outputs among them."""

from __future__ import annotations

import random
from collections.abc import Hashable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree  # where both libraries register their classes of outputs

from safelight.core.trees import Tree

PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device)
"""Types of static values that are what they look like: equal ones mean the same to a network."""
ALIGNMENT = 64
"""Bytes to which an address may matter to a product of few rows; torch's allocator gives multiples of it."""
LOWER = (torch.float16, torch.bfloat16)


def taken_apart(tree: Tree) -> tuple[list[Any], Any]:
    """Return the leaves of a tree, tensors and static values, and its form, which is hashable."""
    return _pytree.tree_flatten(tree)


def put_together(leaves: Iterable[Any], form: Any) -> Tree:
    """Return a tree of a form that `taken_apart` gave."""
    return _pytree.tree_unflatten(list(leaves), form)


def aligned(tree: Tree) -> Tree:
    """Return a tree whose tensors lie in memory as torch allocates it: what NumPy made of an image is copied.

    The last bits of a product may depend on where its operands lie.
    """
    return _pytree.tree_map_only(Tensor, _aligned, tree)


def _aligned(tensor: Tensor) -> Tensor:
    is_ours = tensor.device.type != "cpu" or tensor.untyped_storage().data_ptr() % ALIGNMENT == 0
    return tensor if is_ours else tensor.clone()


def static(leaf: Any) -> Hashable:
    """Return what a static value is, by its type and its text; None for an object of which nobody knows."""
    return (type(leaf).__name__, repr(leaf)) if type(leaf) in PLAIN else None


class RandomStates:
    """The states of random numbers, of this process and of some generators, as they are when this is made.

    Args:
        generators: besides those that everybody has.

    """

    def __init__(self, generators: Iterable[torch.Generator] = ()) -> None:
        self._generators = [torch.default_generator, *generators]
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            self._generators += torch.cuda.default_generators
        self._states, self._others = self._now()

    def have_moved(self) -> bool:
        """Say whether something has drawn random numbers since."""
        states, others = self._now()
        return others != self._others or not all(map(torch.equal, states, self._states))

    def _now(self) -> tuple[list[Tensor], Hashable]:
        state: Any = np.random.get_state(legacy=False)  # whoever draws from it draws from this
        of_numpy = state["state"]["key"].tobytes(), state["state"]["pos"], state["has_gauss"]
        return [generator.get_state() for generator in self._generators], (of_numpy, random.getstate())


class InFloat32(TorchFunctionMode):
    """A context in which a network of lower precision computes in float32, from its own weights.

    Each function of torch is given float32 in place of lower dtypes, a weight at a time: no second network is needed.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function of torch with tensors and dtypes of lower precision as float32."""
        kwargs = kwargs or {}
        if args and isinstance(args[0], Tensor) and args[0].dtype in LOWER and _changes(func.__name__):
            return func(*args, **kwargs)  # of a buffer that weights come into
        args, kwargs = _pytree.tree_map(_lifted, (args, kwargs))
        return func(*args, **kwargs)


def _changes(name: str) -> bool:
    """Say whether a function of this name changes its first argument."""
    return name in ("__setitem__", "__set__") or (name.endswith("_") and not name.endswith("__"))


def _lifted(value: Any) -> Any:
    if isinstance(value, Tensor) and value.dtype in LOWER:
        return value.float()
    return torch.float32 if isinstance(value, torch.dtype) and value in LOWER else value
