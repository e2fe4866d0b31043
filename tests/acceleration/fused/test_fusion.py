"""Fused operations: the operators are the plain forms, wrong kernels are refused, and blocks keep to few launches."""

from __future__ import annotations

import dataclasses
import logging
import subprocess

import pytest
import torch
from torch import nn

from benchmarks.operations import blocks_and_rest, fused_transformer, mean_block
from benchmarks.stacks import STACKS, use_operators
from safelight.acceleration.fused import fusion
from safelight.acceleration.fused.fusion import compare, fusable_layers, fuse
from safelight.acceleration.fused.operations import OPERATIONS, FusedOperation
from safelight.layers import modulation, rotary
from safelight.layers.fusable import FusableLayer
from safelight.layers.modulation import NormModulate
from tests.acceleration.fused.transformers import tiny_transformer

pytestmark = pytest.mark.usefixtures("few_tokens")
CPU = torch.device("cpu")


def without_gate(residual, gate, update, group_size=None):
    return residual + update


def gates_of_the_first_group(residual, gate, update, group_size=None):
    return modulation.gated_residual(residual, gate[:, :1], update)


def with_another_eps(hidden_states, scale, shift, eps, group_size=None):
    return modulation.norm_modulate(hidden_states, scale, shift, 10.0, group_size)


def not_a_number(hidden_states, *rest):
    return torch.full_like(hidden_states, float("nan"))


def in_float32(hidden_states, *rest):
    return modulation.norm_modulate(hidden_states, *rest).float()


def turned_backwards(query, key, query_weight, key_weight, freqs_cis, eps):
    return rotary.qk_norm_rotary(query, key, query_weight, key_weight, freqs_cis.conj(), eps)


def with_swapped_weights(query, key, query_weight, key_weight, freqs_cis, eps):
    return rotary.qk_norm_rotary(query, key, key_weight, query_weight, freqs_cis, eps)


def image_before_text(*arguments):
    return tuple(tensor.flip(1) for tensor in rotary.joint_qk_norm_rotary(*arguments))


def rounded_twice(hidden_states, *rest):
    """Within bfloat16's range of errors, but not within float32's."""
    return modulation.norm_modulate(hidden_states.bfloat16().to(hidden_states.dtype), *rest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("plain", "wrong", "sizes"),
    [
        (modulation.gated_residual, without_gate, (40,)),
        (modulation.gated_residual, gates_of_the_first_group, (40,)),
        (modulation.norm_modulate, with_another_eps, (40,)),
        (modulation.norm_modulate, not_a_number, (40,)),
        (rotary.qk_norm_rotary, turned_backwards, (3, 8, 0)),
        (rotary.qk_norm_rotary, with_swapped_weights, (3, 8, 1)),
        (rotary.joint_qk_norm_rotary, image_before_text, (3, 8)),
    ],
)
def test_a_wrong_kernel_is_refused(plain, wrong, sizes, dtype):
    right = compare(FusedOperation(plain, plain), sizes, 1, CPU, dtype)
    assert right.refusal is None and right.error == right.plain_error
    check = compare(FusedOperation(plain, wrong), sizes, 5, CPU, dtype)
    assert check.refusal is not None and "plain form's" in check.refusal
    assert f"{plain.__name__} {'x'.join(map(str, sizes))}: 5 layers stay plain" in str(check)


def test_less_precision_is_refused():
    operation = FusedOperation(modulation.norm_modulate, rounded_twice)
    assert compare(operation, (40,), 1, CPU, torch.float32).refusal is not None
    assert compare(operation, (40,), 1, CPU, torch.bfloat16).refusal is None
    other_dtype = FusedOperation(modulation.norm_modulate, in_float32)
    assert compare(other_dtype, (40,), 1, CPU, torch.bfloat16).refusal is not None


def test_a_kernel_that_cannot_run_leaves_the_layers_plain():
    def missing(*arguments):
        raise ImportError("No module named 'triton'")

    check = compare(FusedOperation(modulation.norm_modulate, missing), (40,), 2, CPU, torch.float32)
    assert check.refusal == "the kernel does not run: No module named 'triton'" and check.error is None


@pytest.mark.parametrize(
    ("reason", "told"),
    [
        (
            RuntimeError("Failed to find C compiler.\nPlease specify via CC"),
            "Failed to find C compiler. Please specify",
        ),
        (subprocess.CalledProcessError(1, ["gcc", "main.c"]), "non-zero exit status 1"),
        (FileNotFoundError("the cache cannot be written"), "cannot be written"),
    ],
)
def test_a_kernel_that_cannot_be_built_leaves_the_layers_plain(reason, told):
    def unbuilt(*arguments):
        raise reason

    check = compare(FusedOperation(modulation.norm_modulate, unbuilt), (40,), 2, CPU, torch.float32)
    assert check.refusal is not None and told in check.refusal and "\n" not in check.refusal


@pytest.mark.parametrize("failure", [torch.AcceleratorError("CUDA error: assert"), torch.OutOfMemoryError("none left")])
def test_a_device_that_fails_in_the_check_is_no_kernel_that_cannot_run(failure):
    def broken(*arguments):
        raise failure

    with pytest.raises(type(failure)):
        compare(FusedOperation(modulation.norm_modulate, broken), (40,), 2, CPU, torch.float32)


@pytest.mark.parametrize(
    ("device", "dtype", "reason"),
    [("cpu", torch.bfloat16, "there are no kernels for cpu"), ("cuda", torch.float64, "the kernels do not take")],
)
def test_what_has_no_kernel_stays_plain_and_says_so(caplog, device, dtype, reason):
    transformer, _ = tiny_transformer(STACKS["wan"], torch.bfloat16)
    use_operators(transformer)
    with caplog.at_level(logging.INFO, logger="safelight"):
        report = fuse(transformer, torch.device(device), dtype)
    layers = list(fusable_layers(transformer))
    assert all(layer.operation is layer.plain for layer in layers)
    assert report.num_fused == 0 and report.num_plain == len(layers) == 2 * 5 + 1
    assert [record.getMessage() for record in caplog.records] == [str(report)]
    assert all(reason in str(check) for check in report.checks)


def test_each_kind_is_checked_once_and_a_refused_one_stays_plain(monkeypatch):
    """As on a GPU whose kernel of one operation is wrong; a layer of another package's has no fused form."""
    wrong = dataclasses.replace(OPERATIONS["gated_residual"], fused=without_gate)
    monkeypatch.setattr(fusion, "OPERATIONS", {**OPERATIONS, "gated_residual": wrong})
    checked = []

    def compare_on_cpu(operation, sizes, num_layers, device, dtype):
        checked.append((operation.plain.__name__, sizes))
        return compare(operation, sizes, num_layers, CPU, dtype)

    monkeypatch.setattr(fusion, "compare", compare_on_cpu)
    foreign = FusableLayer(nn.functional.gelu, (40,))
    transformer, _ = tiny_transformer(STACKS["flux"], torch.float32)
    report = fuse(nn.ModuleList([transformer, foreign, NormModulate(40)]), torch.device("cuda"), torch.float32)
    assert len(checked) == len(set(checked)) == 6
    for layer in fusable_layers(transformer):
        assert (layer.operation is layer.plain) == (layer.plain is modulation.gated_residual)
    assert foreign.operation is nn.functional.gelu
    assert "gelu 40: 1 layers stay plain: it has no fused form" in str(report)


@pytest.mark.parametrize(("family", "budget"), [("flux", 20), ("wan", 25), ("qwen_image", 26)])
def test_launches_of_a_block(family, budget):
    """Counted on the meta device at the real width; in the mean over the kinds of blocks that the model has."""
    stack = STACKS[family]
    architecture = dataclasses.replace(stack.full.architecture, **{kind.field: 2 for kind in stack.blocks})
    weights = stack.random_transformer(architecture, torch.bfloat16, "meta").state_dict()
    inputs = stack.inputs(stack.full, (1, 8, 8), torch.bfloat16, "meta").for_safelight()
    plain, _ = blocks_and_rest(stack, stack.our_transformer(architecture, weights), inputs)
    fused, _ = blocks_and_rest(stack, fused_transformer(stack, architecture, weights), inputs)
    assert mean_block(stack, stack.full.architecture, fused) <= budget
    assert max(fused) <= 26 and all(few < many for few, many in zip(fused, plain, strict=True))
