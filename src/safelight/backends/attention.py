"""Attention of the package's networks: its dispatcher's backends, under our names."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from safelight.attention.backends import AttentionKind, candidates, compute_capability, disagreement
from safelight.errors import InvalidParameterError

DISPATCHED: Mapping[str, str] = {
    "sdpa": "native",
    "math": "_native_math",
    "flash": "_native_flash",
    "efficient": "_native_efficient",
    "cudnn": "_native_cudnn",
    "flash3": "_flash_3_hub",
    "sage": "sage_hub",
}
"""Backends by our names, and how the package's dispatcher calls the same kernels."""
USUAL_HEAD_SIZE = 64
"""Of attention that does not say it."""


def set_attention_backend(networks: Mapping[str, nn.Module], name: str, device: torch.device) -> None:
    """Have every network whose attention goes through the package's dispatcher use one backend; `auto` changes nothing.

    It is compared with the formula on this device before it is taken, as for our own models.

    Args:
        networks: of a pipeline, by name.
        name: `auto`, or one of our table of backends.
        device: on which they run.

    Raises:
        InvalidParameterError: for an unknown name, for one that the package or this machine does not have, and where no
            network lets it be chosen.
        MissingDependencyError: if the backend needs a package that is missing.

    """
    if name == "auto":
        return
    (backend,) = candidates(name)
    if name not in DISPATCHED:
        known = ", ".join(("auto", *DISPATCHED))
        raise InvalidParameterError("attention_backend", name, f"{known}, for a model run by the diffusers package")
    able = {key: module for key, module in networks.items() if _layers(module)}
    if not able:
        takes = f"auto for this model: the attention of {', '.join(networks)} does not let its backend be chosen"
        raise InvalidParameterError("attention_backend", name, takes)
    backend.loaded()  # says what is missing
    own = replace(backend, kernel=_dispatched(name), load=None)
    capability = compute_capability(device.type)
    for key, module in able.items():
        masks = [argument for argument in inspect.signature(type(module).forward).parameters if "mask" in argument]
        if masks and not backend.takes_mask:
            takes = f"one that takes a mask: {key} is given {', '.join(masks)}"
            raise InvalidParameterError("attention_backend", name, takes)
        dtype = next(module.parameters()).dtype
        for head_size in sorted({_head_size(layer) for layer in _layers(module)}):
            kind = AttentionKind(device.type, dtype, False, head_size, capability)
            reason = own.refusal(kind) or disagreement(own, kind)
            if reason is not None:
                raise InvalidParameterError("attention_backend", name, f"another for {key}: {reason}")
        with _the_default_stays():
            module.set_attention_backend(DISPATCHED[name])  # type: ignore[operator]


def _layers(module: nn.Module) -> list[nn.Module]:
    """Return the attention layers below a network whose processors ask the dispatcher for a backend of their own."""
    return [each for each in module.modules() if "_attention_backend" in dir(_processor(each))]


def _processor(layer: nn.Module) -> Any:
    return getattr(layer, "processor", None)


def _head_size(layer: nn.Module) -> int:
    width, heads = (getattr(layer, name, None) for name in ("inner_dim", "heads"))
    return width // heads if isinstance(width, int) and isinstance(heads, int) else USUAL_HEAD_SIZE


def _dispatched(name: str) -> Any:
    """Return what computes [B, H, S, D] by the package's dispatcher, which has [B, S, H, D]."""
    from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn

    def attend(
        query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float | None
    ) -> Tensor:
        given = [each.transpose(1, 2) for each in (query, key, value)]
        kind = AttentionBackendName(DISPATCHED[name])
        made: Tensor = dispatch_attention_fn(*given, mask, 0.0, causal, scale, backend=kind)
        return made.transpose(1, 2)

    return attend


@contextlib.contextmanager
def _the_default_stays() -> Iterator[None]:
    """Keep what every other network of the process uses: to set one's backend sets that as well."""
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    before, _ = _AttentionBackendRegistry.get_active_backend()
    try:
        yield
    finally:
        _AttentionBackendRegistry.set_active_backend(before)


@contextlib.contextmanager
def torchs_own_attention(module: nn.Module) -> Iterator[None]:
    """Compute a network's attention as torch chooses, for dtypes that its backend does not take."""
    processors = [_processor(layer) for layer in _layers(module)]
    chosen = [processor._attention_backend for processor in processors]
    try:
        for processor in processors:
            processor._attention_backend = None
        yield
    finally:
        for processor, before in zip(processors, chosen, strict=True):
            processor._attention_backend = before
