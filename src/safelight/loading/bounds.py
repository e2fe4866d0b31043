"""Bounds of what a component's JSON may ask for, held before memory is taken: a kilobyte can ask for all of it."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)

from safelight.errors import ModelIndexError

MAX_TENSORS = 20_000
"""Of one component; the largest models have some thousands."""
MAX_NUMBER = 1_000_000
"""Of a solver's integers, which are lengths of its tables."""


@contextmanager
def bounded(where: str, max_bytes: int | None = None) -> Iterator[None]:
    """Refuse a module while this thread builds it, as soon as it has more than it may.

    Args:
        where: the component, in messages.
        max_bytes: of its tensors together, where they take memory.

    Raises:
        ModelIndexError: if it has more tensors than any model, or more bytes than `max_bytes`.

    """
    thread, num_bytes = threading.get_ident(), 0
    seen: set[tuple[nn.Module, str]] = set()  # a library registers a tensor again when it has read it

    def count(module: nn.Module, name: str, tensor: Tensor | None) -> None:
        nonlocal num_bytes
        if tensor is None or threading.get_ident() != thread or (module, name) in seen:
            return
        seen.add((module, name))
        num_bytes += tensor.nbytes
        if len(seen) > MAX_TENSORS:
            raise ModelIndexError(f"{where}: config.json describes more than {MAX_TENSORS:,} tensors")
        if max_bytes is not None and num_bytes > max_bytes:
            raise ModelIndexError(f"{where}: config.json describes a far larger model than the checkpoint holds")

    hooks = (register_module_parameter_registration_hook(count), register_module_buffer_registration_hook(count))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def check_numbers(config: Mapping[str, Any], where: str) -> None:
    """Refuse a solver's configuration whose integers are out of all proportion.

    Raises:
        ModelIndexError: naming the first.

    """
    for name, value in config.items():
        if isinstance(value, int) and abs(value) > MAX_NUMBER:
            raise ModelIndexError(f"{where}: {name}: got {value}; it takes at most {MAX_NUMBER:,}")
