"""The fused operations as torch custom operators, and the plain form that each stands for.

On CUDA an operator is a Triton kernel; elsewhere it is the plain form itself. Compilation, the meta device and whoever
counts operations see one operator.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from safelight.layers import modulation, rotary

# The definition in pieces costs a call a third of what `torch.library.custom_op` adds to it.
LIBRARY = torch.library.Library("safelight", "FRAGMENT")  # type: ignore[no-untyped-call]
Operation = Callable[..., Any]


@cache
def launch() -> ModuleType:
    """Return the module that launches the kernels, which imports Triton.

    Raises:
        ImportError: if Triton is missing.

    """
    from safelight.acceleration.fused import launch

    return launch


def one_like_first(*arguments: Any) -> Tensor:
    """Return a tensor without values for an operation of one result, as large as its first argument."""
    return torch.empty_like(arguments[0], memory_format=torch.contiguous_format)


def two_like_first(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Return tensors without values for an operation of two results, as large as its first argument."""
    return one_like_first(*arguments), one_like_first(*arguments)


def joint_heads(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return tensors without values for query, key and value of text and image."""
    text, image = arguments[0], arguments[3]
    shape = (image.shape[0], text.shape[1] + image.shape[1], *image.shape[2:])
    return image.new_empty(shape), image.new_empty(shape), image.new_empty(shape)


@dataclass(frozen=True)
class FusedOperation:
    """An operation in both forms.

    Attributes:
        plain: the function in plain torch.
        fused: the operator.

    """

    plain: Operation
    fused: Operation


def register(plain: Operation, fake: Operation, on_cuda: Operation) -> FusedOperation:
    """Register an operator with the signature of its plain form, and return both.

    Args:
        plain: the function in plain torch, which computes wherever there is no kernel.
        fake: returns results of the right shapes, without values.
        on_cuda: launches the kernel.

    """
    name = plain.__name__
    LIBRARY.define(name + torch.library.infer_schema(plain, mutates_args=()), tags=(torch.Tag.pt2_compliant_tag,))  # type: ignore[no-untyped-call]
    LIBRARY.impl(name, plain, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    LIBRARY.impl(name, on_cuda, "CUDA")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"{LIBRARY.ns}::{name}", fake, lib=LIBRARY)
    return FusedOperation(plain, getattr(torch.ops.safelight, name).default)


OPERATIONS: Mapping[str, FusedOperation] = {
    operation.plain.__name__: operation
    for operation in (
        register(modulation.norm_modulate, one_like_first, lambda *given: launch().norm_modulate(*given)),
        register(modulation.gated_residual, one_like_first, lambda *given: launch().gated_residual(*given)),
        register(modulation.residual_norm, two_like_first, lambda *given: launch().residual_norm(*given)),
        register(rotary.qk_norm_rotary, two_like_first, lambda *given: launch().qk_norm_rotary(*given)),
        register(rotary.joint_qk_norm_rotary, joint_heads, lambda *given: launch().joint_qk_norm_rotary(*given)),
    )
}
"""Every fused operation by the name of its plain form."""


@cache
def kernel_errors() -> tuple[type[Exception], ...]:
    """Return what a kernel raises that cannot be built or cannot run here.

    Triton's errors, ImportError where it is missing, and what building its launcher raises: RuntimeError without a C
    compiler, CalledProcessError where that finds no headers of Python, OSError where it cannot write.
    """
    errors = (ImportError, OSError, RuntimeError, subprocess.CalledProcessError)
    try:
        from triton.errors import TritonError
    except ImportError:
        return errors
    return (*errors, TritonError)
