"""The CPU's plan and what it changes, against torch in float64 and against Diffusers' own modules."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from safelight.acceleration.cpu import (
    PLAIN,
    CpuPlan,
    accelerate_on_cpu,
    accelerate_vae,
    cpu_plan,
    make_plan,
    route_products,
    this_processor,
)
from safelight.acceleration.cpu_products import (
    FusedGELUProjection,
    OneDNNLinear,
    WidenedLinear,
    is_float32,
    onednn_linear,
    onednn_linear_gelu,
    sharing,
)
from safelight.acceleration.cpu_vae import (
    MIN_CHANNELS,
    DoublingConv,
    WidenedConv2d,
    WinogradConv2d,
    route_convolutions,
)
from safelight.acceleration.group_norm import MIN_PIXELS, group_norm_silu
from safelight.acceleration.winograd import PANEL_WIDTH, winograd_conv2d
from safelight.attention.chunked import chunked_attention
from safelight.layers.linear import FeedForward, GELUProjection
from tests.acceleration.processors import PROCESSORS

ZEN3, ZEN4, ZEN5 = PROCESSORS["Zen 3"], PROCESSORS["Zen 4"], PROCESSORS["Zen 5"]
CASCADE_LAKE, SAPPHIRE_RAPIDS = PROCESSORS["Cascade Lake"], PROCESSORS["Sapphire Rapids"]
EVERYTHING = CpuPlan(True, True, True, True, True)

BACKENDS: Any = torch.backends
"""Whose settings torch makes as it is imported."""

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")


def error(computed, exact):
    return float((computed.detach().double() - exact.detach()).norm() / exact.detach().norm())


@pytest.mark.parametrize(
    ("processor", "expected"),
    [
        ("Zen 3", CpuPlan(widened_bfloat16=True)),
        ("Zen 4", CpuPlan(onednn_products=True, fused_gelu=True, winograd=True, channels_last=True)),
        ("Zen 5", CpuPlan(onednn_products=True, fused_gelu=True, winograd=True, channels_last=True)),
        ("Cascade Lake", CpuPlan(fused_gelu=True, widened_bfloat16=True, winograd=True, channels_last=True)),
        ("Sapphire Rapids", CpuPlan(fused_gelu=True, winograd=True, channels_last=True)),
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


def test_the_plan_is_made_once_and_this_processor_is_read():
    assert cpu_plan() is cpu_plan()
    assert this_processor() == this_processor()


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
        assert error(onednn_linear(x, weight, optional), exact) < 1e-6
        for approximate in ("none", "tanh"):
            activated = onednn_linear_gelu(x, weight, optional, approximate)
            assert float((activated - F.gelu(exact, approximate=approximate)).norm() / exact.norm()) < 1e-6


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
    assert route_products(model, EVERYTHING) == 4
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
    assert computed.dtype is dtype and error(computed, exact) < limit
    assert torch.equal(model(x), computed)


def test_a_plain_plan_changes_nothing():
    model = nn.Sequential(nn.Linear(24, 40), FeedForward(40), nn.Conv2d(1, 1, 3)).bfloat16()
    before = [(name, type(module)) for name, module in model.named_modules()]
    assert route_products(model, PLAIN) == 0
    accelerate_on_cpu(model, PLAIN)
    assert [(name, type(module)) for name, module in model.named_modules()] == before


def test_other_classes_of_layers_are_left_alone():
    class Quantised(nn.Linear):
        pass

    model = nn.Sequential(Quantised(8, 8), nn.Linear(8, 8).half())
    assert route_products(model, EVERYTHING) == 0


@pytest.mark.parametrize("rows", [1, 15, 16, 200])
@pytest.mark.parametrize("seed", range(3))
def test_widened_products_are_no_less_exact(rows, seed):
    generator = torch.Generator().manual_seed(seed)
    linear = nn.Linear(300, 70).bfloat16().requires_grad_(False)
    linear.weight.copy_(torch.randn(70, 300, generator=generator))
    x = torch.randn(rows, 300, generator=generator).bfloat16()
    exact = F.linear(x.double(), linear.weight.double(), linear.bias.double())
    widened = sharing(linear, WidenedLinear)(x)
    assert widened.dtype is torch.bfloat16
    assert error(widened, exact) <= 1.01 * error(linear(x), exact)
    if rows >= 16:
        assert torch.equal(widened, F.linear(x.float(), linear.weight.float(), linear.bias.float()).bfloat16())


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(
    ("batch", "channels", "out_channels", "height", "width"),
    [(1, 1, 1, 1, 1), (2, 5, 7, 9, 13), (1, 16, 8, 4, 600), (1, 33, 20, 531, 6), (1, 128, 64, 70, 50)],
)
def test_winograd_is_the_convolution(batch, channels, out_channels, height, width, seed):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(batch, channels, height, width, generator=generator)
    weight = torch.randn(out_channels, channels, 3, 3, generator=generator)
    bias = torch.randn(out_channels, generator=generator)
    for optional in (bias, None):
        exact = F.conv2d(pixels.double(), weight.double(), None if optional is None else optional.double(), padding=1)
        for laid in (pixels, pixels.contiguous(memory_format=torch.channels_last), pixels.mT.contiguous().mT):
            convolved = winograd_conv2d(laid, weight, optional)
            assert convolved.shape == exact.shape
            assert convolved.is_contiguous(memory_format=torch.channels_last)
            assert error(convolved, exact) < 2e-6


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(
    ("batch", "channels", "out_channels", "height", "width"),
    [(1, 1, 1, 1, 1), (2, 5, 7, 9, 13), (1, 16, 8, 4, 131), (1, 33, 20, 70, 6), (1, 128, 64, 35, 64)],
)
def test_winograd_over_doubled_pixels_is_the_convolution(batch, channels, out_channels, height, width, seed):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(batch, channels, height, width, generator=generator)
    weight = torch.randn(out_channels, channels, 3, 3, generator=generator)
    exact = F.conv2d(F.interpolate(pixels.double(), scale_factor=2.0), weight.double(), padding=1)
    convolved = winograd_conv2d(pixels, weight, None, doubled=True)
    assert convolved.shape == exact.shape
    assert convolved.is_contiguous(memory_format=torch.channels_last)
    assert error(convolved, exact) < 2e-6


@pytest.mark.parametrize(("height", "width"), [(41, 30), (9, PANEL_WIDTH + 1), (5, 2 * PANEL_WIDTH), (150, 3)])
@pytest.mark.parametrize("has_norm", [False, True])
def test_winograd_in_bfloat16_is_rounded_once(height, width, has_norm):
    generator = torch.Generator().manual_seed(width)
    pixels = torch.randn(2, 64, height, width, generator=generator).mul_(2).add_(1).bfloat16()
    conv: Any = nn.Conv2d(64, 32, 3, padding=1).bfloat16().requires_grad_(False)
    norm = nn.GroupNorm(16, 64).requires_grad_(False)
    norm.weight.normal_(generator=generator)
    norm.bias.normal_(generator=generator)
    given = F.silu(deepcopy(norm).double()(pixels.double())) if has_norm else pixels.double()
    exact = F.conv2d(given, conv.weight.double(), conv.bias.double(), padding=1)
    convolved = winograd_conv2d(pixels, conv.weight, conv.bias, norm if has_norm else None)
    assert convolved.dtype is torch.bfloat16
    assert error(convolved, exact) <= 1.01 * error(exact.bfloat16(), exact)
    widened = winograd_conv2d(pixels.float(), conv.weight.float(), conv.bias.float(), norm if has_norm else None)
    assert error(widened, exact) < 2e-6


def test_only_fitting_convolutions_are_replaced():
    wide = MIN_CHANNELS
    kept = [
        nn.Conv2d(wide, wide, 3, padding=1, stride=2),
        nn.Conv2d(wide, wide, 3, padding=2, dilation=2),
        nn.Conv2d(wide, wide, 3),
        nn.Conv2d(wide, wide, 3, padding=1, groups=2),
        nn.Conv2d(wide, wide, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(wide, wide - 1, 3, padding=1),
        nn.Conv2d(wide, wide, 1),
        nn.Conv2d(wide, wide, 5, padding=2),
    ]
    model = nn.Sequential(*kept, nn.Conv2d(wide, wide, 3, padding=1)).requires_grad_(False)
    plain = deepcopy(model)
    assert route_convolutions(model, winograd=True, widen=True) == 1
    assert [type(layer) for layer in model] == [nn.Conv2d] * len(kept) + [WinogradConv2d]
    half = deepcopy(plain).bfloat16()
    assert route_convolutions(half, winograd=True, widen=False) == 0
    assert route_convolutions(half, winograd=True, widen=True) == len(kept) + 1
    assert {type(layer) for layer in half} == {WidenedConv2d, WinogradConv2d}
    for size in ((8, 9), (67, 65), (300, 33)):  # by the definition, and by fewer multiplications
        pixels = torch.randn(1, wide, *size)
        for routed, layer, reference in zip(half, model, plain, strict=True):
            exact = deepcopy(reference).double()(pixels.double())
            assert error(layer(pixels), exact) < 2e-6
            assert error(routed(pixels.bfloat16()), exact) < 1e-2


@pytest.mark.parametrize("mean", [0.0, 100.0])
@pytest.mark.parametrize(
    ("batch", "channels", "groups", "height", "width"), [(2, 8, 2, 5, 7), (1, 32, 32, 129, 65), (1, 96, 3, 300, 90)]
)
def test_group_norm_is_as_exact_as_channels_first(batch, channels, groups, height, width, mean):
    generator = torch.Generator().manual_seed(channels)
    pixels = torch.randn(batch, channels, height, width, generator=generator) * 3 + mean
    norm = nn.GroupNorm(groups, channels, eps=1e-6).requires_grad_(False)
    norm.weight.normal_(generator=generator)
    norm.bias.normal_(generator=generator)
    exact = F.silu(deepcopy(norm).double()(pixels.double()))
    for laid in (pixels, pixels.contiguous(memory_format=torch.channels_last)):
        activated = group_norm_silu(laid, norm)
        assert activated.is_contiguous(memory_format=torch.channels_last)
        assert error(activated, exact) < max(2e-7, 2 * error(F.silu(norm(pixels)), exact))
    half = pixels.bfloat16()
    exact = F.silu(deepcopy(norm).double()(half.double()))
    rounded = exact.bfloat16() if height * width >= MIN_PIXELS else F.silu(norm.bfloat16()(half))
    assert error(group_norm_silu(half, norm), exact) <= 1.01 * error(rounded, exact)


def small_vae(seed, widths=(128, 128)):
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=widths,
        layers_per_block=1,
        latent_channels=4,
    )
    for parameter in vae.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    return vae.eval().requires_grad_(False)


@pytest.mark.parametrize(("seed", "size"), [(0, (33, 34)), (1, (5, 7))])
def test_a_vae_keeps_its_pixels_and_latents(seed, size):
    vae = small_vae(seed)
    ours, half, plain_half = deepcopy(vae), deepcopy(vae).bfloat16(), deepcopy(vae).bfloat16()
    accelerate_vae(ours, EVERYTHING)
    assert {type(block.upsamplers[0]) for block in ours.decoder.up_blocks if block.upsamplers} == {DoublingConv}
    accelerate_vae(half, EVERYTHING)
    assert set(ours.state_dict()) == set(vae.state_dict())
    latents = torch.randn(1, 4, *size)
    pixels = torch.randn(2, 3, size[0] + size[0] % 2, size[1] + size[1] % 2)
    exact = deepcopy(vae).double()
    for call, given in (
        (lambda vae, x: vae.decode(x).sample, latents),
        (lambda vae, x: vae.encode(x).latent_dist.mode(), pixels),
    ):
        reference = call(exact, given.double())
        assert error(call(ours, given), reference) < 1e-5
        rounded = error(call(half, given.bfloat16()), reference)
        assert rounded <= 1.1 * error(call(plain_half, given.bfloat16()), reference)
        assert torch.equal(call(ours, given), call(ours, given))


def formula(query, key, value, mask, causal, scale):
    """Attention in float64, as it is written: [B, H, S, D]."""
    query, key, value = query.double(), key.double(), value.double()
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), float("-inf"))
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype is torch.bool else scores + mask
    return scores.softmax(-1) @ value


@needs_onednn
@pytest.mark.parametrize("masked", ["no", "keys", "pairs", "added"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "queries", "keys", "head_size", "scale"),
    [(4, 4, 70, 70, 64, None), (4, 2, 300, 513, 40, None), (3, 1, 513, 300, 33, 0.7), (1, 1, 1, 1, 8, 0.1)],
)
def test_chunked_attention_follows_the_formula(heads, kv_heads, queries, keys, head_size, scale, causal, masked):
    generator = torch.Generator().manual_seed(queries)
    query = torch.randn(2, heads, queries, head_size, generator=generator).bfloat16()
    key, value = torch.randn(2, 2, kv_heads, keys, head_size, generator=generator).bfloat16()
    shown = torch.rand(2, 1, queries, keys, generator=generator) < 0.8
    shown[..., 0] = True
    mask = {"no": None, "keys": shown[:, :, :1], "pairs": shown, "added": shown.float() * 2}[masked]
    exact = formula(query, key, value, mask, causal, scale)
    attended = chunked_attention(query, key, value, mask, causal, scale)
    assert attended.dtype is torch.bfloat16 and attended.shape == query.shape
    both = shown if mask is None else mask
    if causal and mask is not None:  # torch's takes one of the two
        tril = torch.ones(queries, keys, dtype=torch.bool).tril()
        both = mask & tril if mask.dtype is torch.bool else mask.masked_fill(~tril, float("-inf"))
    theirs = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=None if mask is None else both if both.dtype is torch.bool else both.bfloat16(),
        is_causal=causal and mask is None,
        scale=scale,
        enable_gqa=True,
    )
    assert error(attended, exact) <= max(1.3 * error(theirs, exact), 3e-3)


@needs_onednn
def test_a_query_that_sees_nothing_gets_zeros():
    query, key, value = torch.randn(3, 1, 2, 5, 8).bfloat16()
    mask = torch.ones(5, 5, dtype=torch.bool)
    mask[3] = False
    attended = chunked_attention(query, key, value, mask, False, None)
    assert not attended[:, :, 3].any() and attended.isfinite().all()


@needs_onednn
def test_chunked_attention_is_one_operator_to_a_compiler():
    query, key, value = torch.randn(3, 1, 2, 300, 8).bfloat16()
    torch.library.opcheck(torch.ops.safelight.chunked_attention.default, (query, key, value, None, True, 0.3))
    compiled = torch.compile(chunked_attention, fullgraph=True, backend="eager")
    arguments = (query, key, value, None, False, None)
    assert torch.equal(compiled(*arguments), chunked_attention(*arguments))


def test_gelu_projections_alone_are_fused():
    projection = GELUProjection(8, 16, approximate="none").requires_grad_(False)
    model = nn.Sequential(projection)
    if torch.backends.mkldnn.is_available():
        route_products(model, EVERYTHING)
        x = torch.randn(5, 8)
        assert error(model(x), deepcopy(projection).double()(x.double())) < 1e-6
