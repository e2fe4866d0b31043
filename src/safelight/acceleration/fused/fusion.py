"""Fused operations in place of plain ones, each taken only after it has been compared with them on the device."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from safelight.acceleration.fused.examples import examples
from safelight.acceleration.fused.operations import OPERATIONS, FusedOperation, kernel_errors
from safelight.core.device import is_lost, is_out_of_memory
from safelight.errors import in_one_line
from safelight.layers.fusable import FusableLayer

logger = logging.getLogger(__name__)

SLACK = 1.5
"""A fused result may be off by the plain form's largest error times this, and one unit in the last place."""
KERNEL_DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32})


@dataclass(frozen=True)
class FusionCheck:
    """What was found of the layers with one operation and one size.

    Attributes:
        operation: the name of its plain form.
        sizes: of the layers, such as their channels, or heads and head size.
        num_layers: how many layers these are.
        error: the fused form's largest difference from float64, over the largest value; None if it was not run.
        plain_error: the plain form's.
        refusal: why the layers stay plain; None if they are fused.

    """

    operation: str
    sizes: tuple[int, ...]
    num_layers: int
    error: float | None = None
    plain_error: float | None = None
    refusal: str | None = None

    def __str__(self) -> str:
        """Say it in one line."""
        sizes = "x".join(map(str, self.sizes))
        if self.refusal is not None:
            return f"{self.operation} {sizes}: {self.num_layers} layers stay plain: {self.refusal}"
        errors = f"error {self.error:.1e}, of the plain form {self.plain_error:.1e}"
        return f"{self.operation} {sizes}: {self.num_layers} layers fused, {errors}"


@dataclass(frozen=True)
class FusionReport:
    """What `fuse` did to a module, and why.

    Attributes:
        device_type, dtype: that it was done for.
        checks: one for each operation and size.

    """

    device_type: str
    dtype: torch.dtype
    checks: tuple[FusionCheck, ...]

    @property
    def num_fused(self) -> int:
        """Layers that are fused."""
        return sum(check.num_layers for check in self.checks if check.refusal is None)

    @property
    def num_plain(self) -> int:
        """Layers that stay plain."""
        return sum(check.num_layers for check in self.checks if check.refusal is not None)

    def __str__(self) -> str:
        """Say it in a line for each check."""
        heading = (
            f"fused operations on {self.device_type}, {self.dtype}: {self.num_fused} layers, {self.num_plain} plain"
        )
        return "\n  ".join((heading, *map(str, self.checks)))


def fuse(module: nn.Module, device: torch.device, dtype: torch.dtype) -> FusionReport:
    """Let every layer that has a fused form use it, where the form is exact on this device.

    Each operation is run once for each size of layer, on several hundred tokens: fused, plain, and plain in float64. It
    is taken if no value is further from float64 than `SLACK` times the plain form's largest error, and one unit in the
    last place. It runs on random numbers; the layers' weights are not read.

    Args:
        module: whose layers are set; call it once, when the module is where it will run.
        device: where that is. Only CUDA has fused forms.
        dtype: of activations.

    Returns:
        What was fused, what was not and why; it is logged, too.

    """
    layers = Counter((layer.plain, layer.sizes) for layer in fusable_layers(module))
    checks = {kind: check_kind(*kind, count, device, dtype) for kind, count in layers.items()}
    for layer in fusable_layers(module):
        taken = checks[layer.plain, layer.sizes].refusal is None
        layer.operation = OPERATIONS[layer.plain.__name__].fused if taken else layer.plain
    report = FusionReport(device.type, dtype, tuple(checks.values()))
    logger.info("%s", report)
    return report


def fusable_layers(module: nn.Module) -> Iterator[FusableLayer]:
    """Yield the layers below a module whose operation can be exchanged."""
    return (layer for layer in module.modules() if isinstance(layer, FusableLayer))


def check_kind(
    plain: Callable[..., Any], sizes: tuple[int, ...], num_layers: int, device: torch.device, dtype: torch.dtype
) -> FusionCheck:
    """Return what is found of an operation for layers of one size."""
    name = plain.__name__
    refusal = None
    if name not in OPERATIONS:
        refusal = "it has no fused form"
    elif device.type != "cuda":
        refusal = f"there are no kernels for {device.type}"
    elif dtype not in KERNEL_DTYPES:
        refusal = f"the kernels do not take {dtype}"
    if refusal is not None:
        return FusionCheck(name, sizes, num_layers, refusal=refusal)
    return compare(OPERATIONS[name], sizes, num_layers, device, dtype)


def compare(
    operation: FusedOperation, sizes: tuple[int, ...], num_layers: int, device: torch.device, dtype: torch.dtype
) -> FusionCheck:
    """Run an operation in both forms, and judge the fused one."""
    name, worst, worst_plain, refusal = operation.plain.__name__, 0.0, 0.0, None
    with torch.inference_mode():
        for arguments in examples(operation.plain, sizes, dtype, device):
            try:
                fused = as_tuple(operation.fused(*arguments))
            except kernel_errors() as reason:
                if is_out_of_memory(reason) or is_lost(device, reason):
                    raise
                refusal = f"the kernel does not run: {in_one_line(reason)}"
                return FusionCheck(name, sizes, num_layers, refusal=refusal)
            plain = as_tuple(operation.plain(*arguments))
            exact = as_tuple(operation.plain(*map(in_float64, arguments)))
            for result, usual, reference in zip(fused, plain, exact, strict=True):
                error, plain_error, within = judge(result, usual, reference)
                worst, worst_plain = max(worst, error), max(worst_plain, plain_error)
                if not within:
                    refusal = f"its error is {error:.1e}, the plain form's {plain_error:.1e}"
    return FusionCheck(name, sizes, num_layers, worst, worst_plain, refusal)


def judge(result: Tensor, plain: Tensor, reference: Tensor) -> tuple[float, float, bool]:
    """Return the largest errors of a result and of the plain one, over the largest value, and whether it will do.

    Args:
        result: of the fused form.
        plain: of the plain form, in the same dtype.
        reference: the plain form's in float64.

    """
    largest = float(reference.abs().max())
    difference, plain_difference = (result.double() - reference).abs(), (plain.double() - reference).abs()
    allowed = SLACK * plain_difference.max() + torch.finfo(plain.dtype).eps * reference.abs()
    within = result.dtype == plain.dtype and bool((difference <= allowed).all())
    return float(difference.max()) / largest, float(plain_difference.max()) / largest, within


def in_float64(argument: Any) -> Any:
    """Return a tensor in the double precision of its kind; anything else as it is."""
    if not isinstance(argument, Tensor):
        return argument
    return argument.to(torch.complex128 if argument.is_complex() else torch.float64)


def as_tuple(results: Any) -> tuple[Tensor, ...]:
    """Return the results of an operation, one or more, as a tuple."""
    return results if isinstance(results, tuple) else (results,)
