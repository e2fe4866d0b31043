"""Attention in chunks: where it is taken."""

from __future__ import annotations

import pytest
import torch

from safelight.attention import (
    chunked,
)


@pytest.mark.parametrize(
    ("has_bfloat16", "has_matrix_unit", "expected"),
    [(True, False, True), (True, True, False), (False, False, False)],
    ids=["Zen 5", "Sapphire Rapids", "Cascade Lake"],
)
def test_auto_takes_chunks_where_they_win(monkeypatch, has_bfloat16, has_matrix_unit, expected):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_bfloat16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has_matrix_unit)
    assert chunked.wins_here() is expected
