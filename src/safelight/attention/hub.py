"""Kernels of attention from the Hugging Face Hub, through the package `kernels`.

They are compiled code that this machine downloads and runs. They are loaded only when their backend is asked for by its
name, from one repository and one version of its interface each, and only from publishers that `kernels` itself trusts.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

from torch import Tensor

from safelight.attention.check import AttentionFunction
from safelight.errors import InvalidParameterError, MissingDependencyError


def hub_kernel(backend: str, repository: str, version: int) -> ModuleType:
    """Return the module of a kernel, downloaded if it is not in the cache.

    Args:
        backend: who asks.
        repository: on the Hub.
        version: of its interface; builds of a version differ in nothing that a caller sees.

    Raises:
        MissingDependencyError: if the package `kernels` is missing.
        InvalidParameterError: if there is no kernel for this machine, or it cannot be downloaded.

    """
    try:
        from kernels import get_kernel
    except ImportError as error:
        raise MissingDependencyError(
            f"attention_backend: {backend} needs the package kernels: pip install 'safelight[kernels]'"
        ) from error
    try:
        module: ModuleType = get_kernel(repository, version=version)
    except (OSError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise InvalidParameterError("attention_backend", backend, f"another: {repository}: {reason}") from error
    return module


def heads_last(kernel: Callable[..., Tensor], causal_name: str, scale_name: str, **fixed: Any) -> AttentionFunction:
    """Return a kernel that takes [B, S, H, D], and these names, as what takes [B, H, S, D]."""

    def attend(
        query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float | None
    ) -> Tensor:
        states = (tensor.transpose(1, 2) for tensor in (query, key, value))
        return kernel(*states, **fixed, **{causal_name: causal, scale_name: scale}).transpose(1, 2)

    return attend


def load_flash3() -> AttentionFunction:
    """Return FlashAttention 3 (Shah et al., 2024, arXiv:2407.08608)."""
    kernel = hub_kernel("flash3", "kernels-community/flash-attn3", 1).flash_attn_func
    return heads_last(kernel, "causal", "softmax_scale")


def load_sage() -> AttentionFunction:
    """Return SageAttention (Zhang et al., 2024, arXiv:2411.10958): products of 8-bit numbers."""
    kernel = hub_kernel("sage", "SageAttention/sage-attention", 3).sageattn
    return heads_last(kernel, "is_causal", "sm_scale", tensor_layout="NHD")
