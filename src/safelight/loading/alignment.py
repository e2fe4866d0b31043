"""Weights lie where torch would have put them, so that no byte of a result depends on where a file holds them.

MKL gives the same bits for the same numbers only if they lie alike to a boundary of 64 bytes. On AMD's processors with
AVX-512 a product of one to a few rows, or of one column, and attention with few queries are another in the last bits
for operands that are not at a multiple of 16 bytes (measured on Zen 5; float32 and float64). torch's allocator gives
64, offload 512; a mapped file has whatever offset its header makes, mostly 8 more than a multiple of 16. What a
computation makes on its way comes from the allocator, or is a view at the same offset each time.

A pipeline that the diffusers package runs keeps its weights where that package maps them: nothing here moves them, and
its bytes are that package's.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

ALIGNMENT = 64
"""Bytes, as torch's allocator on the CPU aligns them."""

DEPENDENT = frozenset({torch.float32, torch.float64})
"""Dtypes whose products MKL computes. The others' do not depend on addresses: their weights stay mapped."""


def align_weights(module: nn.Module) -> int:
    """Copy weights on the CPU that lie across the boundary, in place; return how many.

    Args:
        module: whose parameters and buffers are looked at; their values and strides stay.

    """
    moved = [tensor for tensor in (*module.parameters(), *module.buffers()) if not is_aligned(tensor)]
    with torch.inference_mode(False), torch.no_grad():
        for tensor in moved:
            tensor.data = tensor.data.clone()
    return len(moved)


def is_aligned(tensor: Tensor) -> bool:
    """Return whether results cannot depend on where a tensor lies."""
    dependent = tensor.device.type == "cpu" and tensor.dtype in DEPENDENT
    return not dependent or tensor.data_ptr() % ALIGNMENT == 0
