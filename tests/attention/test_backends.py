"""The table of attention's backends: which one is taken where."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch

from safelight.attention import (
    BACKENDS,
    backends,
    select_backend,
)
from safelight.errors import InvalidParameterError


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


@pytest.mark.parametrize("capability", [8, 9, 10, 12])
def test_auto_leaves_the_choice_to_torch_on_cuda(table, monkeypatch, capability):
    monkeypatch.setattr(backends, "compute_capability", lambda device_type: capability)
    assert select_backend("auto", "cuda", torch.bfloat16, False, 128).name == "sdpa"
    assert select_backend("auto", "cuda", torch.float32, False, 128).name == "sdpa"


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
