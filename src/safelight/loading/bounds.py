"""Bounds of what a component's JSON may ask for, held before memory is taken: a kilobyte can ask for all of it."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)

from safelight.errors import ModelIndexError
from safelight.loading.headers import MAX_TENSORS

MAX_WIDENING, SPARE_BYTES = 8, 1 << 30
"""A module that a library builds takes at most so many times the bytes of its file, and so many more: a file in
bfloat16 takes twice its bytes in float32, and embeddings that two modules have in common are counted for both."""


@contextmanager
def bounded(where: str, files: Sequence[Path] | None = None) -> Iterator[None]:
    """Refuse modules while this thread builds them, as soon as they have more than they may.

    Args:
        where: the component, or the model, in messages.
        files: its weights, which its bytes are compared with; None where tensors take no memory.

    Raises:
        ModelIndexError: if there are more tensors than in any model, or far more bytes than in the files.

    """
    max_bytes = math.inf if files is None else SPARE_BYTES + MAX_WIDENING * sum(path.stat().st_size for path in files)
    thread, num_bytes = threading.get_ident(), 0
    seen: set[tuple[nn.Module, str]] = set()  # a library registers a tensor again when it has read it

    def count(module: nn.Module, name: str, tensor: Tensor | None) -> None:
        nonlocal num_bytes
        if tensor is None or threading.get_ident() != thread or (module, name) in seen:
            return
        seen.add((module, name))
        num_bytes += tensor.nbytes
        if len(seen) > MAX_TENSORS:
            raise ModelIndexError(f"{where}: its configuration describes more than {MAX_TENSORS:,} tensors")
        if num_bytes > max_bytes:
            raise ModelIndexError(f"{where}: its configuration describes a far larger model than its weights")

    hooks = (register_module_parameter_registration_hook(count), register_module_buffer_registration_hook(count))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
