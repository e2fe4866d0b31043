"""Kernels of the Hub: how they are called, and that none is fetched unasked."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch

from safelight.attention import (
    BACKENDS,
    Attention,
    backends,
    select_backend,
    set_attention_backend,
)
from safelight.attention.hub import hub_kernel
from safelight.errors import InvalidParameterError, MissingDependencyError
from tests.attention.formula import formula


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
