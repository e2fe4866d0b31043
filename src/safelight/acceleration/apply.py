"""Which operations a loaded component computes by: chosen once, for its device, in one visible order."""

from __future__ import annotations

import torch
from torch import nn

from safelight.acceleration.cpu import accelerate_on_cpu, cpu_plan
from safelight.acceleration.fused.fusion import fuse


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
        module.to(memory_format=torch.channels_last)  # type: ignore[call-overload] # the weights of 2-D convolutions
