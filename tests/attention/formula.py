"""Attention as it is written, and kernels that are wrong in some way."""

from __future__ import annotations

import torch
from torch.nn import functional as F


def formula(query, key, value, mask, causal, scale):
    """Attention in float64, as it is written: [B, S, H, D]."""
    query, key, value = (tensor.double().transpose(1, 2) for tensor in (query, key, value))
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(-1, -2) * (scale or query.shape[-1] ** -0.5)
    if causal:
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), float("-inf"))
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return (scores.softmax(-1) @ value).transpose(1, 2)


def wrong_scale(query, key, value, mask, causal, scale):
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=1.0)


def without_mask(query, key, value, mask, causal, scale):
    return F.scaled_dot_product_attention(query, key, value)


def not_a_number(query, key, value, mask, causal, scale):
    return torch.full_like(query, float("nan"))


def broken(query, key, value, mask, causal, scale):
    raise RuntimeError("No available kernel.\n  Aborting.")


def rounded(query, key, value, mask, causal, scale):
    """As a lossy kernel: query and key with few bits."""
    query, key = ((tensor * 16).round() / 16 for tensor in (query, key))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def exact(query, key, value, mask, causal, scale):
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
