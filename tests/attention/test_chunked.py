"""Attention in chunks: where it is taken, and what it computes."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from safelight.attention import chunked
from safelight.attention.chunked import chunked_attention
from tests.acceleration.processors import needs_onednn
from tests.acceleration.vaes import relative


@pytest.mark.parametrize(
    ("has_bfloat16", "has_matrix_unit", "expected"),
    [(True, False, True), (True, True, False), (False, False, False)],
    ids=["Zen 5", "Sapphire Rapids", "Cascade Lake"],
)
def test_auto_takes_chunks_where_they_win(monkeypatch, has_bfloat16, has_matrix_unit, expected):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_bfloat16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has_matrix_unit)
    assert chunked.wins_here() is expected


def formula(query, key, value, mask, causal, scale):
    """Attention in float64, as it is written: [B, H, S, D]."""
    query, key, value = query.double(), key.double(), value.double()
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), float("-inf"))
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype is torch.bool else scores + mask
    return scores.softmax(-1) @ value


@needs_onednn
@pytest.mark.parametrize("masked", ["no", "keys", "pairs", "added"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "queries", "keys", "head_size", "scale"),
    [(4, 4, 70, 70, 64, None), (4, 2, 300, 513, 40, None), (3, 1, 513, 300, 33, 0.7), (1, 1, 1, 1, 8, 0.1)],
)
def test_chunked_attention_follows_the_formula(heads, kv_heads, queries, keys, head_size, scale, causal, masked):
    generator = torch.Generator().manual_seed(queries)
    query = torch.randn(2, heads, queries, head_size, generator=generator).bfloat16()
    key, value = torch.randn(2, 2, kv_heads, keys, head_size, generator=generator).bfloat16()
    shown = torch.rand(2, 1, queries, keys, generator=generator) < 0.8
    shown[..., 0] = True
    mask = {"no": None, "keys": shown[:, :, :1], "pairs": shown, "added": shown.float() * 2}[masked]
    exact = formula(query, key, value, mask, causal, scale)
    attended = chunked_attention(query, key, value, mask, causal, scale)
    assert attended.dtype is torch.bfloat16 and attended.shape == query.shape
    both = shown if mask is None else mask
    if causal and mask is not None:  # torch's takes one of the two
        tril = torch.ones(queries, keys, dtype=torch.bool).tril()
        both = mask & tril if mask.dtype is torch.bool else mask.masked_fill(~tril, float("-inf"))
    theirs = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=None if mask is None else both if both.dtype is torch.bool else both.bfloat16(),
        is_causal=causal and mask is None,
        scale=scale,
        enable_gqa=True,
    )
    assert relative(attended, exact) <= max(1.3 * relative(theirs, exact), 3e-3)


@needs_onednn
def test_a_query_that_sees_nothing_gets_zeros():
    query, key, value = torch.randn(3, 1, 2, 5, 8).bfloat16()
    mask = torch.ones(5, 5, dtype=torch.bool)
    mask[3] = False
    attended = chunked_attention(query, key, value, mask, False, None)
    assert not attended[:, :, 3].any() and attended.isfinite().all()


@needs_onednn
def test_chunked_attention_is_one_operator_to_a_compiler():
    query, key, value = torch.randn(3, 1, 2, 300, 8).bfloat16()
    torch.library.opcheck(torch.ops.safelight.chunked_attention.default, (query, key, value, None, True, 0.3))
    compiled = torch.compile(chunked_attention, fullgraph=True, backend="eager")
    arguments = (query, key, value, None, False, None)
    assert torch.equal(compiled(*arguments), chunked_attention(*arguments))
