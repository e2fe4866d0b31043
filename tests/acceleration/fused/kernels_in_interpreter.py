"""The Triton kernels against the plain forms and float64. `test_fused_kernels.py` runs this file by itself.

Triton's interpreter has to be asked for before Triton is imported: `TRITON_INTERPRET=1 python -m pytest` on this file.
Without it, and with a GPU, the compiled kernels are tested. The interpreter cuts bfloat16 off where a GPU rounds, which
is half a unit in the last place more; in the sum it is in the norm's error again.
"""

from __future__ import annotations

import itertools
import os
from dataclasses import replace

import pytest
import torch

from benchmarks.stacks import STACKS
from safelight.acceleration.fused import examples, fusion, launch
from safelight.acceleration.fused.fusion import as_tuple, in_float64
from safelight.acceleration.fused.operations import FusedOperation
from safelight.layers import modulation, rotary

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = [] if INTERPRETED else [pytest.mark.cuda]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def drawn(*shape, dtype, seed=0, scale=1.0, offset=0.0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return (scale * torch.randn(*shape, generator=generator) + offset).to(DEVICE, dtype)


def check(plain, fused, *arguments):
    """Hold every result to the bound of `fuse`; return what was computed."""
    results, usual = as_tuple(fused(*arguments)), as_tuple(plain(*arguments))
    reference = as_tuple(plain(*map(in_float64, arguments)))
    for result, expected, exact in zip(results, usual, reference, strict=True):
        assert result.shape == expected.shape and result.dtype == expected.dtype and result.is_contiguous()
        plain_error = (expected.double() - exact).abs().max()
        cut_off = 1 if INTERPRETED and result.dtype == torch.bfloat16 else 0
        allowed = (fusion.SLACK + cut_off) * plain_error + torch.finfo(result.dtype).eps * exact.abs()
        error = (result.double() - exact).abs()
        assert (error <= allowed).all(), f"error {error.max():.2e}, of the plain form {plain_error:.2e}"
    return results


def steering(batch, num_groups, dim, dtype, count):
    """Vectors as models give them: chunks of one projection, so that rows are not contiguous."""
    return drawn(batch, num_groups, count * dim, dtype=dtype, seed=7).chunk(count, dim=-1)


SHAPES = [(1, 3, 64, 1), (2, 2, 96, 1), (3, 1, 200, 1), (1, 1, 3072, 1), (2, 6, 48, 3), (1, 7, 130, 2), (1, 5, 33, 4)]
"""Batch, tokens, channels and groups; in the last two the last group is larger than the rest."""
SAME = [(*shape, dtype, dtype) for shape, dtype in itertools.product(SHAPES, DTYPES)]
MIXED = [(*shape, dtype, torch.float32) for shape, dtype in itertools.product(SHAPES[4:6], DTYPES[1:])]


@pytest.mark.parametrize(("batch", "num_tokens", "dim", "num_groups", "dtype", "steering_dtype"), SAME + MIXED)
def test_norms(batch, num_tokens, dim, num_groups, dtype, steering_dtype):
    states = drawn(batch, num_tokens + 3, dim, dtype=dtype, scale=3, offset=0.5)[:, 2:-1]  # rows of a longer sequence
    update = drawn(batch, dim, num_tokens, dtype=dtype, seed=1).transpose(1, 2)  # channels do not lie together
    gate, scale, shift = steering(batch, num_groups, dim, steering_dtype, 3)
    weight, bias = drawn(2, dim, dtype=steering_dtype, seed=3)
    group_size = None if num_groups == 1 else num_tokens // num_groups
    check(modulation.norm_modulate, launch.norm_modulate, states, scale, shift, 1e-6, group_size)
    check(modulation.gated_residual, launch.gated_residual, states, gate, update, group_size)
    both = (modulation.residual_norm, launch.residual_norm)
    check(*both, states, gate, update, None, None, scale, shift, 1e-6, group_size)
    check(*both, states, gate, update, weight, bias, None, None, 1e-5, group_size)
    check(*both, states, None, update, None, None, scale, shift, 1e-6, group_size)


@pytest.mark.parametrize(
    ("batch", "num_tokens", "num_heads", "head_dim"), [(1, 7, 2, 64), (2, 3, 3, 96), (3, 1, 1, 128), (1, 2, 24, 6)]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_query_and_key(batch, num_tokens, num_heads, head_dim, dtype):
    query, key = (drawn(batch, num_tokens, num_heads, head_dim, dtype=dtype, seed=seed, scale=3) for seed in (0, 1))
    angles = 100 * drawn(num_tokens, head_dim // 2, dtype=torch.float32)
    freqs_cis = torch.polar(torch.ones_like(angles), angles)
    for width in (head_dim, num_heads * head_dim):
        weights = 1 + 0.3 * drawn(2, width, dtype=dtype, seed=2)
        check(rotary.qk_norm_rotary, launch.qk_norm_rotary, query, key, *weights, freqs_cis, 1e-6)


@pytest.mark.parametrize(
    ("batch", "num_text", "num_image", "num_heads", "head_dim"), [(1, 3, 5, 2, 128), (2, 1, 4, 3, 96), (3, 2, 1, 1, 64)]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_joint_query_and_key(batch, num_text, num_image, num_heads, head_dim, dtype):
    text, image = (
        [drawn(batch, tokens, num_heads, head_dim, dtype=dtype, seed=seed + role, scale=3) for role in range(3)]
        for seed, tokens in ((0, num_text), (10, num_image))
    )
    weights = 1 + 0.3 * drawn(4, head_dim, dtype=dtype)
    angles = 100 * drawn(num_text + num_image, head_dim // 2, dtype=torch.float32)
    freqs_cis = torch.polar(torch.ones_like(angles), angles)
    both = (rotary.joint_qk_norm_rotary, launch.joint_qk_norm_rotary)
    value = check(*both, *text, *image, *weights, freqs_cis, 1e-6)[2]
    assert torch.equal(value, torch.cat((text[2], image[2]), dim=1))


LAUNCHES = {
    launched.__name__: launched
    for launched in (
        launch.norm_modulate,
        launch.gated_residual,
        launch.residual_norm,
        launch.qk_norm_rotary,
        launch.joint_qk_norm_rotary,
    )
}


@pytest.mark.parametrize("stack", STACKS.values(), ids=STACKS.keys())
def test_whole_models(stack, monkeypatch):
    """Every kind of layer passes the check, computes by its kernel, and the model's result stays what it was."""
    monkeypatch.setattr(examples, "NUM_TOKENS", 3)
    monkeypatch.setattr(examples, "NUM_TEXT", 1)
    architecture = replace(stack.tiny.architecture, **{kind.field: 1 for kind in stack.blocks})
    *_, grid = stack.tiny.grids.values()
    size = replace(stack.tiny, architecture=architecture, num_text=3)
    transformer = stack.random_transformer(architecture, torch.float32, "cpu")
    for parameter in transformer.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    transformer.to(DEVICE)
    inputs = stack.inputs(size, grid, torch.float32, DEVICE).for_safelight()
    with torch.inference_mode():
        expected = transformer(**inputs)
        for kind in {(layer.plain, layer.sizes) for layer in fusion.fusable_layers(transformer)}:
            operation = FusedOperation(kind[0], LAUNCHES[kind[0].__name__])
            assert fusion.compare(operation, kind[1], 1, torch.device(DEVICE), torch.float32).refusal is None
        for layer in fusion.fusable_layers(transformer):
            layer.operation = LAUNCHES[layer.plain.__name__]
        torch.testing.assert_close(transformer(**inputs), expected, atol=1e-4, rtol=1e-4)
