"""Linear layers by torch's other library, against torch in float64."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from safelight.acceleration.cpu import this_processor
from safelight.acceleration.cpu_products import WidenedLinear, is_float32, onednn_linear
from tests.acceleration.processors import needs_onednn
from tests.acceleration.vaes import relative


def one_after_the_other(x, weight, bias):
    """Add the products up in the order in which they stand: no float32 product is further from exact."""
    total = bias.expand(*x.shape[:-1], -1).clone()
    for channel in range(x.shape[-1]):
        total.addcmul_(x[..., channel : channel + 1], weight[:, channel])
    return total


def in_parts(size):
    """Return a product that adds up partial sums of so many channels, as another kernel would."""
    return lambda x, w, b: sum(
        (F.linear(part, its) for part, its in zip(x.split(size, -1), w.split(size, -1), strict=True)), b
    )


FLOAT32_PRODUCTS = {
    "torch": F.linear,
    "channels one by one": one_after_the_other,
    "channels by 4": in_parts(4),
    "channels by 64": in_parts(64),
    "backwards": lambda x, w, b: F.linear(x.flip(-1), w.flip(-1), b),
    "float64": lambda x, w, b: F.linear(x.double(), w.double(), b.double()).float(),
}


@pytest.mark.parametrize("name", FLOAT32_PRODUCTS)
def test_a_float32_product_is_one_in_whatever_order_it_adds_up(name):
    assert is_float32(FLOAT32_PRODUCTS[name])


@needs_onednn
def test_what_plans_compute_by_is_float32_here():
    """Where the processor rounds to less by itself, the plan does without; nothing else may refuse it."""
    assert is_float32(onednn_linear) or "amx_bf16" in this_processor().flags


def cut(bits):
    """Return a function that keeps so many bits of a float32's mantissa."""
    return lambda x: (x.view(torch.int32) & -(1 << (23 - bits))).view(torch.float32)


LESS = {
    "bfloat16 inputs": lambda x, w, b: F.linear(x.bfloat16().float(), w, b),
    "bfloat16 weights": lambda x, w, b: F.linear(x, w.bfloat16().float(), b),
    "bfloat16 result": lambda x, w, b: F.linear(x, w, b).bfloat16().float(),
    "bfloat16": lambda x, w, b: F.linear(x.bfloat16(), w.bfloat16()).float(),
    "float16": lambda x, w, b: F.linear(x.half().float(), w.half().float(), b),
    "TF32": lambda x, w, b: F.linear(cut(10)(x), cut(10)(w), b),
    "no bias": lambda x, w, b: F.linear(x, w),
    "nothing": lambda x, w, b: torch.full((*x.shape[:-1], w.shape[0]), float("nan")),
}


@pytest.mark.parametrize("name", LESS)
def test_less_than_float32_is_told(name):
    assert not is_float32(LESS[name])


@needs_onednn
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("rows", "channels", "out_channels"), [((1,), 1, 1), ((3, 7), 13, 5), ((2, 65), 96, 384), ((515,), 768, 130)]
)
def test_products_by_onednn_are_float32(rows, channels, out_channels, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*rows, channels, generator=generator)
    weight, bias = (torch.randn(*shape, generator=generator) for shape in ((out_channels, channels), (out_channels,)))
    for optional in (bias, None):
        exact = F.linear(x.double(), weight.double(), None if optional is None else optional.double())
        assert relative(onednn_linear(x, weight, optional), exact) < 1e-6
        for approximate in ("none", "tanh"):
            activated = onednn_linear(x, weight, optional, "gelu", approximate)
            assert float((activated - F.gelu(exact, approximate=approximate)).norm() / exact.norm()) < 1e-6


@pytest.mark.parametrize("rows", [1, 15, 16, 200])
@pytest.mark.parametrize("seed", range(3))
def test_widened_products_are_no_less_exact(rows, seed):
    generator = torch.Generator().manual_seed(seed)
    linear = nn.Linear(300, 70).bfloat16().requires_grad_(False)
    linear.weight.copy_(torch.randn(70, 300, generator=generator))
    x = torch.randn(rows, 300, generator=generator).bfloat16()
    exact = F.linear(x.double(), linear.weight.double(), linear.bias.double())
    layer = deepcopy(linear)
    layer.__class__ = WidenedLinear
    widened = layer(x)
    assert widened.dtype is torch.bfloat16
    assert relative(widened, exact) <= 1.01 * relative(linear(x), exact)
    if rows >= 16:
        assert torch.equal(widened, F.linear(x.float(), linear.weight.float(), linear.bias.float()).bfloat16())
