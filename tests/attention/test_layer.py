"""The attention layer against the formula, on every backend that runs here."""

from __future__ import annotations

import pytest
import torch

from safelight.attention import (
    BACKENDS,
    Attention,
    AttentionMetadata,
    backends,
    set_attention_backend,
)
from safelight.attention.backends import HALF, AttentionBackend
from safelight.errors import InvalidParameterError
from tests.attention.formula import formula, without_mask

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
