"""The Triton kernels of the fused operations.

Everything is computed in float32 and rounded once, but for the sum of a residual and its update, which is rounded
before the norm reads it, as in the plain form. A program of the norms has one token; a program of query, key and value
has all heads of one token.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def residual_norm_kernel(
    residual,
    gate,
    update,
    scale,
    shift,
    total,
    normed,
    residual_batch_stride,
    residual_token_stride,
    update_batch_stride,
    update_token_stride,
    gate_batch_stride,
    gate_group_stride,
    scale_batch_stride,
    scale_group_stride,
    shift_batch_stride,
    shift_group_stride,
    num_tokens,
    group_size,
    last_group,
    dim,
    eps,
    HAS_UPDATE: tl.constexpr,
    HAS_GATE: tl.constexpr,
    HAS_NORM: tl.constexpr,
    ONE_PLUS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute one token: `total = residual + gate * update`, and `normed = norm(total) * (1 + scale) + shift`."""
    row = tl.program_id(0).to(tl.int64)
    batch, token = row // num_tokens, row % num_tokens
    group = tl.minimum(token // group_size, last_group)
    channels = tl.arange(0, BLOCK)
    inside = channels < dim
    start = residual + batch * residual_batch_stride + token * residual_token_stride
    states = tl.load(start + channels, mask=inside, other=0.0).to(tl.float32)
    if HAS_UPDATE:
        start = update + batch * update_batch_stride + token * update_token_stride
        added = tl.load(start + channels, mask=inside, other=0.0).to(tl.float32)
        if HAS_GATE:
            start = gate + batch * gate_batch_stride + group * gate_group_stride
            added *= tl.load(start + channels, mask=inside, other=0.0).to(tl.float32)
        rounded = (states + added).to(total.dtype.element_ty)
        tl.store(total + row * dim + channels, rounded, mask=inside)
        states = rounded.to(tl.float32)
    if HAS_NORM:
        centred = tl.where(inside, states - tl.sum(states, axis=0) / dim, 0.0)
        variance = tl.sum(centred * centred, axis=0) / dim
        start = scale + batch * scale_batch_stride + group * scale_group_stride
        factor = tl.load(start + channels, mask=inside, other=0.0).to(tl.float32)
        if ONE_PLUS:
            factor += 1.0
        start = shift + batch * shift_batch_stride + group * shift_group_stride
        offset = tl.load(start + channels, mask=inside, other=0.0).to(tl.float32)
        steered = centred * tl.div_rn(1.0, tl.sqrt_rn(variance + eps)) * factor + offset
        tl.store(normed + row * dim + channels, steered.to(normed.dtype.element_ty), mask=inside)


@triton.jit
def norm_rotary_heads(
    source,
    target,
    weight,
    rotation,
    num_heads,
    head_dim,
    eps,
    ACROSS_HEADS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """Norm and turn all heads of one token; with `rotation`, cosine and sine lie beside each other."""
    heads = tl.arange(0, BLOCK_HEADS)[:, None]
    channels = tl.arange(0, BLOCK_DIM)[None, :]
    inside = (heads < num_heads) & (channels < head_dim)
    states = tl.load(source + heads * head_dim + channels, mask=inside, other=0.0).to(tl.float32)
    if ACROSS_HEADS:
        mean = tl.sum(tl.sum(states * states, axis=1), axis=0) / (num_heads * head_dim)
        factor = tl.load(weight + heads * head_dim + channels, mask=inside, other=0.0).to(tl.float32)
        normed = states * tl.div_rn(1.0, tl.sqrt_rn(mean + eps)) * factor
    else:
        means = tl.sum(states * states, axis=1) / head_dim
        factor = tl.load(weight + channels, mask=channels < head_dim, other=0.0).to(tl.float32)
        normed = states * tl.div_rn(1.0, tl.sqrt_rn(means + eps))[:, None] * factor
    angles = tl.load(rotation + channels, mask=channels < head_dim, other=0.0)
    cosine, sine = tl.split(tl.reshape(angles, (1, BLOCK_DIM // 2, 2)))
    real, imaginary = tl.split(tl.reshape(normed, (BLOCK_HEADS, BLOCK_DIM // 2, 2)))
    turned = tl.join(real * cosine - imaginary * sine, real * sine + imaginary * cosine)
    turned = tl.reshape(turned, (BLOCK_HEADS, BLOCK_DIM)).to(target.dtype.element_ty)
    tl.store(target + heads * head_dim + channels, turned, mask=inside)


@triton.jit
def copy_heads(source, target, width, BLOCK: tl.constexpr):
    """Copy all heads of one token."""
    channels = tl.arange(0, BLOCK)
    inside = channels < width
    tl.store(target + channels, tl.load(source + channels, mask=inside), mask=inside)


@triton.jit
def place_heads(
    query,
    key,
    value,
    query_weight,
    key_weight,
    rotation,
    joint_query,
    joint_key,
    joint_value,
    num_heads,
    head_dim,
    eps,
    role,
    ACROSS_HEADS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """Compute one of query, key and value of one token, all of them given at that token."""
    if role == 0:
        norm_rotary_heads(
            query, joint_query, query_weight, rotation, num_heads, head_dim, eps, ACROSS_HEADS, BLOCK_HEADS, BLOCK_DIM
        )
    elif role == 1:
        norm_rotary_heads(
            key, joint_key, key_weight, rotation, num_heads, head_dim, eps, ACROSS_HEADS, BLOCK_HEADS, BLOCK_DIM
        )
    else:
        copy_heads(value, joint_value, num_heads * head_dim, BLOCK_HEADS * BLOCK_DIM)


@triton.jit
def qk_norm_rotary_kernel(
    text_query,
    text_key,
    text_value,
    query,
    key,
    value,
    text_query_weight,
    text_key_weight,
    query_weight,
    key_weight,
    rotation,
    joint_query,
    joint_key,
    joint_value,
    num_text,
    num_image,
    num_heads,
    head_dim,
    eps,
    ACROSS_HEADS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """Compute one token's query, key or value, and put it where the joint sequence has it.

    The grid's axes are the joint sequence's tokens, the batch, and query, key and value.
    """
    token, batch, role = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2)
    width = num_heads * head_dim
    to = (batch * (num_text + num_image) + token) * width
    angles = rotation + token * head_dim
    if token < num_text:
        at = (batch * num_text + token) * width
        place_heads(
            text_query + at, text_key + at, text_value + at, text_query_weight, text_key_weight, angles,
            joint_query + to, joint_key + to, joint_value + to,
            num_heads, head_dim, eps, role, ACROSS_HEADS, BLOCK_HEADS, BLOCK_DIM,
        )  # fmt: skip
    else:
        at = (batch * num_image + token - num_text) * width
        place_heads(
            query + at, key + at, value + at, query_weight, key_weight, angles,
            joint_query + to, joint_key + to, joint_value + to,
            num_heads, head_dim, eps, role, ACROSS_HEADS, BLOCK_HEADS, BLOCK_DIM,
        )  # fmt: skip
