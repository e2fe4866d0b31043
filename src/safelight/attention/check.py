"""Whether a kernel of attention computes it on this machine: it is compared with the formula before it is taken."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

AttentionFunction = Callable[[Tensor, Tensor, Tensor, Tensor | None, bool, float | None], Tensor]
"""Attention on query, key and value [B, H, S, D], a mask, whether it is causal, and the factor of the scores."""

NUM_HEADS, NUM_QUERIES, NUM_KEYS = 2, 301, (301, 77)
LARGEST_LOSS = 0.1
"""The error over which even a lossy kernel is taken for broken."""


def largest_error(dtype: torch.dtype, lossy: bool) -> float:
    """Return the relative error that a kernel may have; scores and sums of an exact one are float32."""
    return LARGEST_LOSS if lossy else max(torch.finfo(dtype).eps, 2e-6)


def is_present(device_type: str) -> bool:
    """Say whether there is such a device here."""
    if device_type == "cpu":
        return True
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator is not None and accelerator.type == device_type


def formula(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Return attention in float64, [B, H, S, D], by torch's composite of single operations."""
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(query.double(), key.double(), value.double(), attn_mask=mask)


def relative_error(
    attend: AttentionFunction, device_type: str, dtype: torch.dtype, head_size: int, has_mask: bool
) -> float:
    """Return how far a kernel is from the formula in float64, by norms, in self-attention and cross-attention.

    Lengths are odd; a mask hides the last quarter of the keys, as padding does.

    Raises:
        RuntimeError: by torch, if the kernel cannot run.

    """
    generator, worst = torch.Generator().manual_seed(0), 0.0
    for num_keys in NUM_KEYS:
        query, key, value = (
            torch.randn(1, num_tokens, NUM_HEADS, head_size, generator=generator).to(device_type, dtype).transpose(1, 2)
            for num_tokens in (NUM_QUERIES, num_keys, num_keys)
        )
        mask = torch.arange(num_keys, device=device_type)[None, None, None] < num_keys - num_keys // 4
        given = mask if has_mask else None
        with torch.inference_mode():
            attended = attend(query, key, value, given, False, None).cpu().double()
            exact = formula(query.cpu(), key.cpu(), value.cpu(), mask.cpu() if has_mask else None)
        error = float((attended - exact).norm() / exact.norm())
        worst = max(worst, error) if error == error else error  # not a number is the worst
    return worst
