"""A tiny transformer of a family, with fused forms of its operations or without."""

from __future__ import annotations

import torch


def tiny_transformer(stack, dtype):
    size, grid = stack.tiny, next(iter(stack.tiny.grids.values()))
    torch.manual_seed(1)
    transformer = stack.random_transformer(size.architecture, dtype, "cpu")
    for parameter in transformer.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return transformer, stack.inputs(size, grid, dtype).for_safelight()
