"""The attention layer against the formula, on every backend that runs here."""

from __future__ import annotations

import logging
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from safelight.attention import (
    BACKENDS,
    Attention,
    AttentionMetadata,
    backends,
    chunked,
    select_backend,
    set_attention_backend,
)
from safelight.attention.backends import HALF, AttentionBackend
from safelight.attention.hub import hub_kernel
from safelight.attention.layer import backend_for_masks
from safelight.errors import InvalidParameterError, MissingDependencyError


@pytest.fixture
def table(monkeypatch):
    """The table of backends, to be changed; what was chosen before is forgotten, and again at the end."""
    changed = dict(BACKENDS)
    monkeypatch.setattr(backends, "BACKENDS", changed)
    select_backend.cache_clear()
    backend_for_masks.cache_clear()
    yield changed
    select_backend.cache_clear()
    backend_for_masks.cache_clear()


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
        ("flash3", "cuda", torch.float32, False, 64, "flash3: it does not take torch.float32"),
        ("flash3", "cuda", torch.bfloat16, False, 320, "heads of at most 256, not 320"),
        ("flash3", "cuda", torch.bfloat16, True, 64, "takes no attention mask"),
        ("flash3", "cuda", torch.bfloat16, False, 64, "compute capability 9.x, not none"),
        ("sage", "cuda", torch.bfloat16, False, 160, "heads of at most 128, not 160"),
        ("sage", "cuda", torch.bfloat16, False, 64, "compute capability 8.x or 9.x or 12.x, not none"),
        ("sage", "cpu", torch.bfloat16, False, 64, "does not run on cpu"),
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("kernel", "reason"),
    [
        (wrong_scale, "its result is off by"),
        (not_a_number, "its result is off by nan"),
        (broken, "it does not run: No available kernel. Aborting."),
    ],
)
def test_a_kernel_is_compared_with_the_formula_before_it_is_taken(table, kernel, reason, dtype):
    row = AttentionBackend("fast", kernel, {"cpu": backends.FLOATS})
    table.clear()
    table.update({"fast": row, "sdpa": BACKENDS["sdpa"]})
    assert select_backend("auto", "cpu", dtype, False, 16).name == "sdpa"
    with pytest.raises(InvalidParameterError, match=reason):
        select_backend("fast", "cpu", dtype, False, 16)
    table["fast"] = replace(row, kernel=exact)
    select_backend.cache_clear()
    assert select_backend("auto", "cpu", dtype, False, 16).name == "fast"


def test_a_kernel_may_be_right_without_a_mask_alone(table):
    table.clear()
    table["fast"] = AttentionBackend("fast", without_mask, {"cpu": backends.FLOATS})
    table["sdpa"] = BACKENDS["sdpa"]
    layer, (query, key, value) = Attention(2, 8), torch.randn(3, 2, 5, 2, 8)
    set_attention_backend(layer, "auto", "cpu", torch.float32)
    mask = torch.tensor([True, True, False, True, False])[None, None, None]
    attended = layer(query, key, value, AttentionMetadata(attn_mask=mask))
    assert layer.backend.name == "fast" and layer.masked_backend is BACKENDS["sdpa"]
    torch.testing.assert_close(attended.double(), formula(query, key, value, mask, False, None), atol=1e-5, rtol=0)
    set_attention_backend(layer, "fast", "cpu", torch.float32)
    with pytest.raises(InvalidParameterError, match="takes a mask"):
        layer(query, key, value, AttentionMetadata(attn_mask=mask))


def test_lossy_kernels_are_taken_by_name_alone(table, caplog):
    lossy = AttentionBackend("lossy", rounded, {"cpu": backends.FLOATS}, lossy=True)
    table.clear()
    table.update({"lossy": lossy, "sdpa": BACKENDS["sdpa"]})
    assert select_backend("auto", "cpu", torch.float32, False, 16).name == "sdpa"
    with caplog.at_level(logging.WARNING, logger="safelight"):
        assert select_backend("lossy", "cpu", torch.float32, False, 16) is lossy
    assert "lossy is off by" in caplog.text
    table["lossy"] = replace(lossy, kernel=wrong_scale)
    select_backend.cache_clear()
    with pytest.raises(InvalidParameterError, match="its result is off by"):
        select_backend("lossy", "cpu", torch.float32, False, 16)


@pytest.mark.parametrize("capability", [8, 9, 10, 12])
def test_auto_leaves_the_choice_to_torch_on_cuda(table, monkeypatch, capability):
    monkeypatch.setattr(backends, "compute_capability", lambda device_type: capability)
    assert select_backend("auto", "cuda", torch.bfloat16, False, 128).name == "sdpa"
    assert select_backend("auto", "cuda", torch.float32, False, 128).name == "sdpa"


class Hub:
    """Stands for the package `kernels`; its kernels have the signatures of those on the Hub."""

    def __init__(self):
        self.asked = []

    def get_kernel(self, repository, *, version):
        self.asked.append((repository, version))
        if repository.startswith("missing/"):
            raise FileNotFoundError("no build for this machine")
        return SimpleNamespace(flash_attn_func=self.flash_attn_func, sageattn=self.sageattn)

    @staticmethod
    def flash_attn_func(q, k, v, softmax_scale=None, causal=False):
        return formula(q, k, v, None, causal, softmax_scale).to(q.dtype)

    @staticmethod
    def sageattn(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None):
        assert tensor_layout == "NHD"
        return formula(q, k, v, None, is_causal, sm_scale).to(q.dtype)


@pytest.fixture
def hub(monkeypatch):
    package = Hub()
    monkeypatch.setitem(sys.modules, "kernels", package)
    return package


@pytest.mark.parametrize(
    ("name", "repository"),
    [("flash3", ("kernels-community/flash-attn3", 1)), ("sage", ("SageAttention/sage-attention", 3))],
)
@pytest.mark.parametrize(("causal", "kv_heads", "scale"), [(False, 4, None), (True, 2, 0.5)])
def test_kernels_of_the_hub_follow_the_formula(table, hub, name, repository, causal, kv_heads, scale):
    """Their arguments and layout: the stand-ins compute on the CPU, in float32."""
    table[name] = replace(BACKENDS[name], dtypes={"cpu": backends.FLOATS}, capabilities=None)
    query, (key, value) = torch.randn(2, 7, 4, 8), torch.randn(2, 2, 7, kv_heads, 8)
    layer = Attention(4, 8, causal=causal, softmax_scale=scale, num_kv_heads=kv_heads)
    set_attention_backend(layer, name, "cpu", torch.float32)
    attended = layer(query, key, value)
    torch.testing.assert_close(attended.double(), formula(query, key, value, None, causal, scale), atol=1e-5, rtol=0)
    assert hub.asked == [repository]


def test_nothing_is_fetched_unless_it_is_asked_for_by_name(table, hub, monkeypatch):
    monkeypatch.setattr(backends, "compute_capability", lambda device_type: 9)
    for name in ("auto", "sdpa", "cudnn"):
        select_backend(name, "cuda", torch.bfloat16, False, 64)
    assert hub.asked == []
    select_backend("flash3", "cuda", torch.bfloat16, False, 64)
    assert len(hub.asked) == 1


def test_a_kernel_that_cannot_be_had_is_refused(table, hub, monkeypatch):
    monkeypatch.setattr(backends, "compute_capability", lambda device_type: 9)
    with pytest.raises(InvalidParameterError, match="missing/kernel: no build for this machine"):
        hub_kernel("flash3", "missing/kernel", 1)
    monkeypatch.setitem(sys.modules, "kernels", None)
    with pytest.raises(
        MissingDependencyError, match=r"sage needs the package kernels: pip install 'safelight\[kernels\]'"
    ):
        select_backend("sage", "cuda", torch.bfloat16, False, 64)


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


@pytest.mark.parametrize("name", ["sdpa", "math", "flash"])
@pytest.mark.parametrize(("num_queries", "num_keys", "causal"), [(7, 7, True), (5, 9, False), (1, 3, False)])
def test_what_a_compiler_is_shown_is_what_is_computed(name, num_queries, num_keys, causal):
    query, key, value = (torch.randn(2, tokens, 4, 16).transpose(1, 2) for tokens in (num_queries, num_keys, num_keys))
    given = (query, key, value, None, causal, None, name)
    torch.library.opcheck(backends.attention_operator, given, test_utils=("test_schema", "test_faketensor"))
    expected = BACKENDS[name](query, key, value, None, causal, None)
    assert torch.equal(backends.attention_operator(*given), expected)


def test_one_graph_takes_every_length_where_a_compiler_may_not_look_in(monkeypatch):
    """As on CUDA, where it would find a length that it takes for a constant."""
    monkeypatch.setattr(backends, "OPAQUE_ON", frozenset({"cpu"}))
    seen = []

    def counting(graph, inputs):
        seen.append([node.target for node in graph.graph.nodes if node.op == "call_function"])
        return graph.forward

    layer = Attention(4, 16)
    compiled = torch.compile(layer, dynamic=True, fullgraph=True, backend=counting)
    with torch.inference_mode():
        for length in (7, 12, 33):
            query, key, value = (torch.randn(2, length, 4, 16) for _ in range(3))
            assert torch.equal(compiled(query, key, value), layer(query, key, value))
    assert len(seen) == 1
    assert [target for target in seen[0] if "attention" in str(target)] == [torch.ops.safelight.attention.default]
