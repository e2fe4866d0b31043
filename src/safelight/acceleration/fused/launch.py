"""The fused operations on a GPU: each function computes what its namesake in `layers` does in plain torch.

It needs Triton, which comes with torch's builds for CUDA.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from safelight.acceleration.fused.kernels import qk_norm_rotary_kernel, residual_norm_kernel


def num_warps(block: int) -> int:
    """Return the warps of a program over `block` values: about 16 values a thread."""
    return min(max(block // 512, 1), 16)


def on_rows(tensor: Tensor) -> Tensor:
    """Return the tensor, copied if the channels of a row do not lie together."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def launch_residual_norm(
    residual: Tensor,
    gate: Tensor | None,
    update: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    total: Tensor,
    normed: Tensor,
    one_plus: bool,
    eps: float,
    group_size: int | None,
) -> None:
    """Run the kernel over every token, into `total` where there is an update and into `normed` where there is a scale.

    Args:
        residual, update: [B, S, C].
        gate, scale, shift: [B, G, C], or what broadcasts to it.
        total, normed: [B, S, C], contiguous; written.
        one_plus: whether one is added to `scale`.
        eps: of the norm.
        group_size: tokens that share a vector; None where all do.

    """
    batch, num_tokens, dim = residual.shape
    rows = [residual if tensor is None else on_rows(tensor) for tensor in (residual, update)]
    steering = [vectors for vectors in (gate, scale, shift) if vectors is not None]
    num_groups = max(vectors.shape[1] for vectors in steering) if steering and group_size is not None else 1
    # What is absent is never read: any pointer does.
    gate_rows, scale_rows, shift_rows = (
        rows[0] if vectors is None else on_rows(vectors).expand(batch, num_groups, dim)
        for vectors in (gate, scale, shift)
    )
    strided = (*rows, gate_rows, scale_rows, shift_rows)
    block = triton.next_power_of_2(dim)
    with torch.cuda.device_of(residual):  # type: ignore[no-untyped-call]
        residual_norm_kernel[(batch * num_tokens,)](
            rows[0], gate_rows, rows[1], scale_rows, shift_rows, total, normed,
            *(stride for tensor in strided for stride in tensor.stride()[:2]),
            num_tokens, group_size or num_tokens, num_groups - 1, dim, eps,
            HAS_UPDATE=update is not None, HAS_GATE=gate is not None, HAS_NORM=scale is not None, ONE_PLUS=one_plus,
            BLOCK=block, num_warps=num_warps(block),
        )  # fmt: skip


def launch_qk_norm_rotary(
    text: Sequence[Tensor],
    image: Sequence[Tensor],
    weights: Sequence[Tensor],
    freqs_cis: Tensor,
    joint: Sequence[Tensor],
    num_text: int,
    num_roles: int,
    eps: float,
) -> None:
    """Run the kernel over every token of the joint sequence.

    Args:
        text, image: query, key and value, [B, S, H, D].
        weights: of the norms of the text's query and key, then of the image's; [D] or [H * D].
        freqs_cis: complex64 [S, D/2], of the joint sequence.
        joint: query, key and value, [B, S, H, D], contiguous; written.
        num_text: tokens of text.
        num_roles: 3, or 2 where the value is left out.
        eps: of the norms.

    """
    batch, num_tokens, num_heads, head_dim = joint[0].shape
    block_heads, block_dim = triton.next_power_of_2(num_heads), triton.next_power_of_2(head_dim)
    with torch.cuda.device_of(joint[0]):  # type: ignore[no-untyped-call]
        qk_norm_rotary_kernel[(num_tokens, batch, num_roles)](
            *(tensor.contiguous() for tensor in (*text, *image, *weights)),
            torch.view_as_real(freqs_cis.resolve_conj()).contiguous(),
            *joint, num_text, num_tokens - num_text, num_heads, head_dim, eps,
            ACROSS_HEADS=len(weights[2]) != head_dim,
            BLOCK_HEADS=block_heads, BLOCK_DIM=block_dim, num_warps=num_warps(block_heads * block_dim),
        )  # fmt: skip


def empty_rows(tensor: Tensor) -> Tensor:
    """Return a contiguous tensor for values of the same shape and dtype."""
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def norm_modulate(
    hidden_states: Tensor, scale: Tensor, shift: Tensor, eps: float, group_size: int | None = None
) -> Tensor:
    """Return the modulated norm; arguments as in `layers.modulation.norm_modulate`."""
    normed = empty_rows(hidden_states)
    launch_residual_norm(hidden_states, None, None, scale, shift, normed, normed, True, eps, group_size)
    return normed


def gated_residual(residual: Tensor, gate: Tensor, update: Tensor, group_size: int | None = None) -> Tensor:
    """Return the sum; arguments as in `layers.modulation.gated_residual`."""
    total = empty_rows(residual)
    launch_residual_norm(residual, gate, update, None, None, total, total, True, 0.0, group_size)
    return total


def residual_norm(
    residual: Tensor,
    gate: Tensor | None,
    update: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    eps: float,
    group_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the sum and its norm; arguments as in `layers.modulation.residual_norm`."""
    total, normed = empty_rows(residual), empty_rows(residual)
    modulated = scale is not None
    if not modulated:
        assert weight is not None and bias is not None, "a norm is modulated, or has weights"
        scale, shift = weight[None, None], bias[None, None]
    launch_residual_norm(residual, gate, update, scale, shift, total, normed, modulated, eps, group_size)
    return total, normed


def qk_norm_rotary(
    query: Tensor, key: Tensor, query_weight: Tensor, key_weight: Tensor, freqs_cis: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Return query and key; arguments as in `layers.rotary.qk_norm_rotary`."""
    turned_query, turned_key = empty_rows(query), empty_rows(key)
    heads, weights = (query, key, key), (query_weight, key_weight)
    outputs = (turned_query, turned_key, turned_key)
    launch_qk_norm_rotary(heads, heads, (*weights, *weights), freqs_cis, outputs, 0, 2, eps)
    return turned_query, turned_key


def joint_qk_norm_rotary(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return query, key and value; arguments as in `layers.rotary.joint_qk_norm_rotary`."""
    text, image, weights, (freqs_cis, eps) = arguments[:3], arguments[3:6], arguments[6:10], arguments[10:]
    batch, num_text, *heads = text[0].shape
    query, key, value = (text[0].new_empty(batch, num_text + image[0].shape[1], *heads) for _ in range(3))
    launch_qk_norm_rotary(text, image, weights, freqs_cis, (query, key, value), num_text, 3, eps)
    return query, key, value
