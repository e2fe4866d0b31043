"""Which operations a loaded component computes by: chosen once, for its device, in one visible order."""

from __future__ import annotations

import torch
from torch import nn

from safelight.acceleration.cpu import accelerate_on_cpu, cpu_plan
from safelight.acceleration.fused.fusion import fuse
from safelight.layers.convolution import channels_last


def accelerate(module: nn.Module, kernels: str, device: torch.device, dtype: torch.dtype) -> None:
    """Give a component the operations that are fastest on its device and as exact as the plain ones.

    Args:
        module: a component, with its weights.
        kernels: `auto`, or `plain`, which leaves everything as torch has it.
        device: where it will run.
        dtype: of its weights.

    """
    if kernels == "plain":
        return
    if device.type == "cpu":
        accelerate_on_cpu(module, cpu_plan())
    elif device.type == "cuda":
        fuse(module, device, dtype)
        convolve_with_channels_last(module)


def convolve_with_channels_last(module: nn.Module) -> None:
    """Lay the weights of 2-D convolutions as tensor cores read them; what they make is laid so, too."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            part.weight.data = channels_last(part.weight.data)
