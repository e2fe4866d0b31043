"""The attention layer against the formula, on every backend that runs here."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch

from safelight.attention import (
    BACKENDS,
    Attention,
    AttentionMetadata,
    backends,
    chunked,
    select_backend,
    set_attention_backend,
)
from safelight.attention.backends import HALF
from safelight.errors import InvalidParameterError


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


CPU_BACKENDS = [name for name, backend in BACKENDS.items() if torch.float32 in backend.dtypes.get("cpu", ())]


@pytest.mark.parametrize("backend", ["auto", *CPU_BACKENDS])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2)])
@pytest.mark.parametrize("scale", [None, 0.5])
def test_backends_follow_the_formula(backend, causal, heads, kv_heads, scale):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 7, heads, 8, generator=generator)
    key, value = torch.randn(2, 2, 7, kv_heads, 8, generator=generator)
    layer = Attention(heads, 8, causal=causal, softmax_scale=scale, num_kv_heads=kv_heads)
    set_attention_backend(layer, backend, "cpu", torch.float32)
    attended = layer(query, key, value)
    assert attended.shape == query.shape
    torch.testing.assert_close(attended.double(), formula(query, key, value, None, causal, scale), atol=1e-5, rtol=0)


def test_a_mask_hides_keys():
    query, key, value = torch.randn(3, 2, 5, 4, 8)
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])[:, None, None, :]
    layer = Attention(4, 8)
    attended = layer(query, key, value, AttentionMetadata(attn_mask=mask))
    torch.testing.assert_close(attended.double(), formula(query, key, value, mask, False, None), atol=1e-5, rtol=0)
    key[1, 3:], value[1, 3:] = 1e4, 1e4
    torch.testing.assert_close(layer(query, key, value, AttentionMetadata(attn_mask=mask)), attended)


@pytest.mark.parametrize(
    ("requested", "device", "dtype", "masked", "head_size", "expected"),
    [
        ("auto", "cpu", torch.float32, True, 64, "sdpa"),
        ("auto", "cuda", torch.bfloat16, False, 128, "sdpa"),
        ("cudnn", "cuda", torch.bfloat16, False, 128, "cudnn"),
        ("cudnn", "cuda", torch.bfloat16, False, 256, "heads of at most 128, not 256"),
        ("cudnn", "cpu", torch.bfloat16, False, 64, "does not run on cpu"),
        ("flash", "cuda", torch.float32, False, 64, "does not take torch.float32 on cuda"),
        ("flash", "cuda", torch.float16, True, 64, "takes no attention mask"),
        ("efficient", "cuda", torch.float32, True, 512, "efficient"),
        ("nonsense", "cpu", torch.float32, False, 64, "auto, chunked, sdpa, math, flash"),
        ("chunked", "cpu", torch.float32, False, 64, "does not take torch.float32 on cpu"),
    ],
)
def test_the_table(requested, device, dtype, masked, head_size, expected):
    if expected in BACKENDS:
        assert select_backend(requested, device, dtype, masked, head_size).name == expected
    else:
        with pytest.raises(InvalidParameterError, match=expected):
            select_backend(requested, device, dtype, masked, head_size)


def test_the_choice_is_logged_once(caplog):
    select_backend.cache_clear()
    with caplog.at_level(logging.INFO, logger="safelight"):
        for _ in range(3):
            select_backend("auto", "cpu", torch.float32, False, 24)
    assert [record.getMessage() for record in caplog.records] == ["attention on cpu, torch.float32, head size 24: sdpa"]


def test_a_forward_chooses_nothing_and_compiles_as_one_graph():
    layer = Attention(2, 8)
    set_attention_backend(layer, "auto", "cpu", torch.float32)
    query, key, value = torch.randn(3, 1, 5, 2, 8)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    assert torch.equal(compiled(query, key, value), layer(query, key, value))


def test_a_mask_is_refused_by_a_backend_that_takes_none():
    layer = Attention(2, 8)
    set_attention_backend(layer, "flash", "cpu", torch.float32)
    query, key, value = torch.randn(3, 1, 5, 2, 8)
    with pytest.raises(InvalidParameterError, match="takes a mask"):
        layer(query, key, value, AttentionMetadata(attn_mask=torch.ones(5, 5, dtype=torch.bool)))


def test_a_backend_that_cannot_is_refused_when_it_is_set():
    with pytest.raises(InvalidParameterError, match="attention_backend"):
        set_attention_backend(torch.nn.Sequential(Attention(2, 64)), "cudnn", "cpu", torch.float32)
    assert {torch.float16, torch.bfloat16} == HALF


@pytest.mark.parametrize(
    ("has_bfloat16", "has_matrix_unit", "expected"),
    [(True, False, True), (True, True, False), (False, False, False)],
    ids=["Zen 5", "Sapphire Rapids", "Cascade Lake"],
)
def test_auto_takes_chunks_where_they_win(monkeypatch, has_bfloat16, has_matrix_unit, expected):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_bfloat16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has_matrix_unit)
    assert chunked.wins_here() is expected


@pytest.mark.parametrize(("in_auto", "expected"), [(True, "chunked"), (False, "sdpa")])
def test_auto_leaves_out_what_is_taken_by_name_alone(monkeypatch, in_auto, expected):
    offered = {**BACKENDS, "chunked": replace(BACKENDS["chunked"], in_auto=in_auto)}
    monkeypatch.setattr(backends, "BACKENDS", offered)
    select_backend.cache_clear()
    assert select_backend("auto", "cpu", torch.bfloat16, False, 64).name == expected
    assert select_backend("chunked", "cpu", torch.bfloat16, True, 64).name == "chunked"
    assert select_backend("auto", "cpu", torch.float32, False, 64).name == "sdpa"
    select_backend.cache_clear()
