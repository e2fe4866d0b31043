"""Rotary position embedding against Diffusers' own."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.embeddings import (
    apply_rotary_emb as reference_apply,
)
from diffusers.models.embeddings import (
    get_1d_rotary_pos_embed,
)

from safelight.layers.rotary import apply_rotary_emb, rotary_table
from tests.layers.comparisons import close


@pytest.mark.parametrize("axes", [(8,), (4, 6, 6), (16, 56, 56)])
def test_rotary(axes):
    ids = torch.randint(0, 300, (21, len(axes))).float()
    table = rotary_table(ids, axes)
    pairs = [
        get_1d_rotary_pos_embed(
            dim, ids[:, axis], repeat_interleave_real=True, use_real=True, freqs_dtype=torch.float64
        )
        for axis, dim in enumerate(axes)
    ]
    cos, sin = (torch.cat(tables, dim=-1) for tables in zip(*pairs, strict=True))
    assert torch.equal(table.real.repeat_interleave(2, 1), cos) and torch.equal(table.imag.repeat_interleave(2, 1), sin)
    for dtype, atol in ((torch.float32, 1e-6), (torch.bfloat16, 2e-2)):
        states = torch.randn(2, 21, 3, sum(axes)).to(dtype)
        turned = apply_rotary_emb(states, table)
        assert turned.dtype == dtype
        close(turned, reference_apply(states, (cos, sin), sequence_dim=1), atol)
