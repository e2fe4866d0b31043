"""Which operations a loaded component computes by: chosen once, for its device, in one visible order."""

from __future__ import annotations

import torch
from torch import nn

from safelight.acceleration.cpu import PLAIN, CpuPlan, cpu_plan, route_products
from safelight.acceleration.fused.fusion import fuse
from safelight.layers.convolution import convolve_with_channels_last


def accelerate(module: nn.Module, kernels: str, device: torch.device, dtype: torch.dtype) -> None:
    """Give a component the operations that are fastest on its device and as exact as the plain ones.

    Args:
        module: a component, with its weights.
        kernels: `auto`, or `plain`, which leaves everything as torch has it.
        device: where it will run.
        dtype: of its weights.

    """
    route_products(module, cpu_routes(kernels, device))
    if kernels == "auto" and device.type == "cuda":
        fuse(module, device, dtype)
        convolve_with_channels_last(module)


def cpu_routes(kernels: str, device: torch.device) -> CpuPlan:
    """Return what is computed otherwise than torch would by itself: elsewhere than on the CPU nothing."""
    return cpu_plan() if kernels == "auto" and device.type == "cpu" else PLAIN
