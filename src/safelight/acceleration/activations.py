"""How many bytes of activations a piece of work needs, without doing it where its tensors are on the meta device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

META, HOST = torch.device("meta"), torch.device("cpu")
ONE_KERNEL = frozenset({torch.ops.aten.scaled_dot_product_attention.default})
"""Operations that torch would compose of others on the meta device, and that are one kernel where it computes."""


def count_peak(fn: Callable[[], object]) -> int:
    """Return the most bytes that were alive at one time in storages that a call allocated, what it returns among them.

    What lies outside, such as weights and arguments, is not counted, nor what a kernel needs for itself and gives back
    before it returns. Attention counts as one kernel.

    Args:
        fn: called once, in inference mode. Its tensors may be on the meta device, where nothing is computed, or on any
            other; the count is the same.

    """
    with torch.inference_mode(), LiveStorages() as live:
        fn()
    return live.peak


class LiveStorages(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows the storages that operations allocate, each once however many tensors are views of it.

    Attributes:
        peak: the most bytes that were alive after an operation, its inputs among them.

    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak: int = 0
        self._outside: dict[int, StorageWeakRef] = {}
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}
        # A weak reference keeps the address, not the memory: no address stands for two storages.

    def __enter__(self) -> LiveStorages:
        """Begin to follow."""
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation, in its parts if torch composes it, and count what it allocates."""
        kwargs = kwargs or {}
        if func not in ONE_KERNEL:
            with self:
                made = func.decompose(*args, **kwargs)
            if made is not NotImplemented:
                return made
        for storage in storages((args, kwargs)):
            if storage._cdata not in self._live:
                self._outside.setdefault(storage._cdata, weak(storage))
        made = func(*args, **kwargs)
        new = [storage for storage in storages(made) if storage._cdata not in self._outside]
        sizes = [self._live.get(storage._cdata, (None, None))[1] for storage in new]
        if sizes != [storage.nbytes() for storage in new]:  # no more live after any other operation
            self._live.update({storage._cdata: (weak(storage), storage.nbytes()) for storage in new})
            self.peak = max(self.peak, self.num_bytes)
        return made

    @property
    def num_bytes(self) -> int:
        """What is alive now."""
        self._live = {key: entry for key, entry in self._live.items() if not expired(entry[0])}
        return sum(size for _, size in self._live.values())


def storages(tree: Any) -> Iterator[torch.UntypedStorage]:
    """Yield the storage of each tensor in nested containers."""
    for leaf in tree_leaves(tree):
        if isinstance(leaf, Tensor):
            yield leaf.untyped_storage()


def weak(storage: torch.UntypedStorage) -> StorageWeakRef:
    """Return a reference that does not keep the storage alive."""
    return StorageWeakRef(storage)  # type: ignore[no-untyped-call]


def expired(reference: StorageWeakRef) -> bool:
    """Say whether the storage was freed."""
    gone: bool = reference.expired()  # type: ignore[no-untyped-call]
    return gone


def on_meta(tensor: Tensor) -> Tensor:
    """Return a tensor of the same form without memory."""
    return tensor.to(META)


def on_host(tensor: Tensor) -> Tensor:
    """Return a tensor that has values: its own, or zeros where it has none."""
    return torch.zeros_like(tensor, device=HOST) if tensor.device == META else tensor


def leaves_meta(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Say whether arguments of `Tensor.to` name a device where tensors have values."""
    named = [*args, kwargs.get("device")]
    devices = [each.device if isinstance(each, Tensor) else each for each in named if not isinstance(each, bool)]
    return any(isinstance(each, torch.device | str | int) and torch.device(each) != META for each in devices)


class Valueless(TorchFunctionMode):
    """Answers for tensors on the meta device, which have no values: what is asked of them is true, or 1."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Answer, or let torch."""
        if args and isinstance(args[0], Tensor) and args[0].device == META:
            if func is Tensor.__bool__:
                return True
            if func is Tensor.item:
                return 1
            if func is Tensor.cpu:
                return self.on_host(args[0])
            if func in (Tensor.numpy, Tensor.tolist):
                return func(self.on_host(args[0]))
            if func is Tensor.to and leaves_meta(args[1:], kwargs or {}):
                return func(self.on_host(args[0]), *args[1:], **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def on_host(self, tensor: Tensor) -> Tensor:
        """Return what a tensor is when it has left the meta device."""
        return on_host(tensor)
