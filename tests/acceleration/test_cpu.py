"""The plan for a processor, and which layers it routes."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import nn

from safelight.acceleration.cpu import PLAIN, CpuPlan, cpu_plan, make_plan, route_products, this_processor
from safelight.acceleration.cpu_products import FusedGELUProjection, OneDNNLinear, WidenedLinear
from safelight.layers.linear import FeedForward, GELUProjection
from tests.acceleration.processors import EVERYTHING, PROCESSORS, needs_onednn
from tests.acceleration.vaes import relative

ZEN3, ZEN4, ZEN5 = PROCESSORS["Zen 3"], PROCESSORS["Zen 4"], PROCESSORS["Zen 5"]
CASCADE_LAKE, SAPPHIRE_RAPIDS = PROCESSORS["Cascade Lake"], PROCESSORS["Sapphire Rapids"]
BACKENDS: Any = torch.backends
"""Whose settings torch makes as it is imported."""


@pytest.mark.parametrize(
    ("processor", "expected"),
    [
        ("Zen 3", CpuPlan(widened_bfloat16=True)),
        ("Zen 4", CpuPlan(onednn_products=True, fused_gelu=True, channels_last=True)),
        ("Zen 5", CpuPlan(onednn_products=True, fused_gelu=True, channels_last=True)),
        ("Cascade Lake", CpuPlan(fused_gelu=True, widened_bfloat16=True, channels_last=True)),
        ("Sapphire Rapids", CpuPlan(fused_gelu=True, channels_last=True)),
        ("AVX2", CpuPlan(widened_bfloat16=True)),
        ("Graviton", PLAIN),
        ("unknown", PLAIN),
    ],
)
def test_the_plan_is_a_function_of_the_processor(processor, expected):
    assert make_plan(PROCESSORS[processor], True, lambda product: True) == expected
    assert make_plan(PROCESSORS[processor], False, lambda product: True) == PLAIN


@pytest.mark.parametrize("processor", [ZEN3, ZEN4, ZEN5, CASCADE_LAKE, SAPPHIRE_RAPIDS])
def test_an_inexact_product_is_not_used(processor):
    plan = make_plan(processor, True, lambda product: False)
    assert not plan.onednn_products and not plan.fused_gelu


def test_the_plan_is_made_once_and_this_processor_is_read():
    assert cpu_plan() is cpu_plan()
    assert this_processor() == this_processor()


def process_settings():
    return (
        BACKENDS.mkldnn.matmul.fp32_precision,
        BACKENDS.mkldnn.conv.fp32_precision,
        BACKENDS.mkldnn.fp32_precision,
        BACKENDS.mkldnn.enabled,
        BACKENDS.fp32_precision,
        torch.get_float32_matmul_precision(),
        torch.is_inference_mode_enabled(),
        torch.get_num_threads(),
    )


class Failing(nn.Module):
    """Notes the process's settings as it is called, then fails if it is to."""

    def __init__(self, fails):
        super().__init__()
        self.fails = fails
        self.seen = []

    def forward(self, x):
        self.seen.append(process_settings())
        if self.fails:
            raise RuntimeError("on purpose")
        return x


@needs_onednn
@pytest.mark.parametrize("precision", ["none", "ieee"])
@pytest.mark.parametrize("fails", [False, True])
def test_no_setting_of_the_process_changes(fails, precision):
    """Before, in the middle, behind, behind a failure, and behind a generator that is closed."""
    model = nn.Sequential(FeedForward(32), nn.Linear(32, 32), Failing(fails), nn.Linear(32, 32))
    set_before = BACKENDS.mkldnn.matmul.fp32_precision
    BACKENDS.mkldnn.matmul.fp32_precision = precision
    try:
        before = process_settings()
        route_products(model, EVERYTHING)

        def steps():
            while True:
                yield model(torch.randn(4, 32))

        running = steps()
        if fails:
            with pytest.raises(RuntimeError, match="on purpose"):
                next(running)
        else:
            next(running)
        running.close()
        assert process_settings() == before
        assert model[2].seen == [before]
    finally:
        BACKENDS.mkldnn.matmul.fp32_precision = set_before


@needs_onednn
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_routed_layers_keep_their_parameters_and_names(dtype):
    model: Any = nn.Sequential(nn.Linear(24, 40), FeedForward(40, 100), nn.Linear(40, 8, bias=False)).to(dtype).eval()
    before = model.state_dict()
    plain = deepcopy(model)
    route_products(model, EVERYTHING)
    linear, projection, last = model[0], model[1].net[0], model[2]
    assert type(linear) is type(last) is (OneDNNLinear if dtype is torch.float32 else WidenedLinear)
    assert type(projection) is FusedGELUProjection
    assert not any(module.training for module in model.modules())
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(after[name].data_ptr() == before[name].data_ptr() for name in before)
    model.load_state_dict(plain.state_dict())
    x = torch.randn(3, 50, 24, generator=torch.Generator().manual_seed(0)).to(dtype)
    exact = plain.double()(x.double())
    limit = 1e-6 if dtype is torch.float32 else 1e-2
    computed = model(x)
    assert computed.dtype is dtype and relative(computed, exact) < limit
    assert torch.equal(model(x), computed)


def test_a_plain_plan_changes_nothing():
    model = nn.Sequential(nn.Linear(24, 40), FeedForward(40), nn.Conv2d(1, 1, 3)).bfloat16()
    before = [(name, type(module)) for name, module in model.named_modules()]
    route_products(model, PLAIN)
    assert [(name, type(module)) for name, module in model.named_modules()] == before


def test_other_classes_of_layers_are_left_alone():
    class Quantised(nn.Linear):
        pass

    model = nn.Sequential(Quantised(8, 8), nn.Linear(8, 8).half())
    route_products(model, EVERYTHING)
    assert [type(layer) for layer in model] == [Quantised, nn.Linear]


def test_gelu_projections_alone_are_fused():
    projection = GELUProjection(8, 16, approximate="none").requires_grad_(False)
    model = nn.Sequential(projection)
    if torch.backends.mkldnn.is_available():
        route_products(model, EVERYTHING)
        x = torch.randn(5, 8)
        assert relative(model(x), deepcopy(projection).double()(x.double())) < 1e-6
