"""The conditioning cache over a package's encoders: what they made of equal arguments is not made again."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Collection, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from safelight.backends.trees import ALIGNMENT, RandomStates, static, taken_apart
from safelight.core.calls import ModelCall
from safelight.core.conditioning_cache import ConditioningCache
from safelight.core.model_runner import Forward, Make
from safelight.core.trees import Tree


class EncoderCache:
    """A wrapper that answers calls of encoders from what the same calls gave before.

    A call is the same if its component, its weights, its method and every argument are: tensors by their bytes and how
    they lie, static values by what they are. One that is given anything else is made, and so is one that has drawn
    random numbers: from the generators that it is given, or those that everybody has. Every request has its own copies.

    Args:
        cache: of the model.
        encodes: says whether a call is of an encoder.
        training: components that are not wholly in evaluation mode: their dropout may draw.

    """

    def __init__(
        self, cache: ConditioningCache, encodes: Callable[[ModelCall], bool], training: Collection[str]
    ) -> None:
        self._cache, self._encodes, self._training = cache, encodes, training

    def __call__(self, forwards: Sequence[Forward], make: Make) -> list[Tree]:
        """Make those forwards whose results are not kept."""
        keys = [self._key(forward) for forward in forwards]
        made = iter(make([forward for forward, key in zip(forwards, keys, strict=True) if key is None]))
        return [
            next(made) if key is None else self._remembered(forward, key, make)
            for forward, key in zip(forwards, keys, strict=True)
        ]

    def _key(self, forward: Forward) -> Hashable | None:
        """Return what a call is known by; None for one that is not kept."""
        call = forward.call
        if not self._cache.max_bytes or call.component in self._training or not self._encodes(call):
            return None
        how = tuple(static(value) for value in _flat(call.static))
        digest = digest_of(call.kwargs)
        return None if digest is None or None in how else (call.method, how, forward.form, digest)

    def _remembered(self, forward: Forward, key: Hashable, make: Make) -> Tree:
        component, arguments = forward.call.component, forward.call.kwargs
        found = self._cache.get(component, key)
        if found is not None:
            return rebuilt(*found)
        leaves = taken_apart(arguments)[0]
        states = RandomStates([leaf for leaf in leaves if isinstance(leaf, torch.Generator)])
        (result,) = make([forward])
        if not states.have_moved() and self._key(forward) == key:  # nor has it changed what it was given
            kept = packed(result, [leaf for leaf in leaves if isinstance(leaf, Tensor)])
            if kept is not None:
                self._cache.put(*kept, component, key)
        return result


def _flat(values: Any) -> list[Any]:
    return taken_apart(dict(values))[0]


def digest_of(arguments: Any) -> bytes | None:
    """Return a digest of a tree of arguments; None where an object is among them of which nobody knows.

    A generator stands for itself: what matters is whether the call draws from it.
    """
    leaves, form = taken_apart(dict(arguments))
    hashed = hashlib.blake2b(repr(form).encode(), digest_size=32)
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            place = leaf.data_ptr() % ALIGNMENT
            hashed.update(f"{leaf.dtype} {leaf.device} {leaf.shape} {leaf.stride()} {place};".encode())
            hashed.update(leaf.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
            continue
        said = "generator" if isinstance(leaf, torch.Generator) else static(leaf)
        if said is None:
            return None
        hashed.update(f"{len(repr(said))} {said!r};".encode())
    return hashed.digest()


Place = tuple[torch.Size, tuple[int, ...], int]
"""Of a tensor in its memory: size, stride, offset."""
Shell = tuple[Any, list[Tensor], list[Place]]
"""A result without its tensors: with others in their places, those, and where the true ones lie in their memory."""


def packed(result: Tree, given: Sequence[Tensor]) -> tuple[list[Tensor], Shell] | None:
    """Return copies of a result's memory, and what is left of the result; None where it cannot be copied.

    Whatever holds the tensors, lists or objects of a library, is copied with them. What lies in the memory of an
    argument is not kept, nor is what holds a module.

    Args:
        result: of a call.
        given: tensors of its arguments.

    """
    copies: dict[int, Any] = {}
    try:
        copy.deepcopy(result, copies)
    except TypeError:  # of what holds a lock, or runs
        return None
    tensors = {place: each for place, each in copies.items() if isinstance(each, Tensor)}
    ours = {tensor.untyped_storage().data_ptr() for tensor in given}
    theirs = {tensor.untyped_storage().data_ptr() for tensor in _originals(copies) if isinstance(tensor, Tensor)}
    if ours & theirs or any(isinstance(each, nn.Module) for each in copies.values()):
        return None
    standing = {place: torch.empty(0) for place in tensors}
    shell = copy.deepcopy(result, dict[int, Any](standing))
    places = [(each.size(), each.stride(), int(each.storage_offset())) for each in tensors.values()]
    return [_memory(each) for each in tensors.values()], (shell, list(standing.values()), places)


def _originals(copies: dict[int, Any]) -> list[Any]:
    """Return what `deepcopy` has copied: it keeps them, so that none is copied twice."""
    found: list[Any] = copies.get(id(copies), [])
    return found


def _memory(tensor: Tensor) -> Tensor:
    """Return the whole memory in which a tensor lies."""
    size = tensor.untyped_storage().nbytes() // tensor.element_size()
    return tensor.as_strided((size,), (1,), 0)


def rebuilt(memory: Sequence[Tensor], shell: Shell) -> Tree:
    """Return a result with memory of its own, as it was packed."""
    empty, standing, places = shell
    tensors = [each.clone().as_strided(*place) for each, place in zip(memory, places, strict=True)]
    return copy.deepcopy(empty, {id(stood): tensor for stood, tensor in zip(standing, tensors, strict=True)})
