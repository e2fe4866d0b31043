"""A kernel is compared with the formula before it is taken."""

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
from safelight.attention.backends import AttentionBackend
from safelight.errors import InvalidParameterError
from tests.attention.formula import broken, exact, not_a_number, rounded, wrong_scale


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
