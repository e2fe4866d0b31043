"""Fused operations as operators: without a kernel they are the plain forms."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.library import opcheck

from benchmarks.stacks import STACKS, unfuse, use_operators
from safelight.acceleration.fused import examples, fusion
from safelight.acceleration.fused.fusion import fusable_layers
from safelight.acceleration.fused.operations import OPERATIONS
from tests.acceleration.fused.transformers import tiny_transformer

pytestmark = pytest.mark.usefixtures("few_tokens")
CPU = torch.device("cpu")
SIZES: dict[str, list[tuple[int, ...]]] = {
    "norm_modulate": [(40,)],
    "gated_residual": [(40,)],
    "residual_norm": [(40, 0), (40, 1)],
    "qk_norm_rotary": [(3, 8, 0), (3, 8, 1)],
    "joint_qk_norm_rotary": [(3, 8)],
}
KINDS = [(name, sizes) for name, kinds in SIZES.items() for sizes in kinds]


def test_every_operation_is_tested():
    assert SIZES.keys() == OPERATIONS.keys()


@pytest.mark.parametrize(("name", "sizes"), KINDS)
def test_operators_keep_torchs_rules(name, sizes):
    """Schema, autograd registration, results' shapes on fake tensors, and tracing with sizes unknown."""
    operation = OPERATIONS[name]
    for arguments in itertools.islice(examples.examples(operation.plain, sizes, torch.float32, CPU), 1, 3):
        opcheck(getattr(torch.ops.safelight, name).default, arguments)


@pytest.mark.parametrize(("name", "sizes"), KINDS)
def test_an_operator_without_a_kernel_is_the_plain_form(name, sizes):
    operation = OPERATIONS[name]
    for arguments in examples.examples(operation.plain, sizes, torch.bfloat16, CPU):
        results, expected = operation.fused(*arguments), operation.plain(*arguments)
        for result, plain in zip(fusion.as_tuple(results), fusion.as_tuple(expected), strict=True):
            assert torch.equal(result, plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stack", STACKS.values(), ids=STACKS.keys())
def test_models_give_equal_bytes_with_operators(stack, dtype):
    transformer, inputs = tiny_transformer(stack, dtype)
    with torch.inference_mode():
        expected = transformer(**inputs)
        use_operators(transformer)
        layers = list(fusable_layers(transformer))
        assert layers and all(layer.operation is not layer.plain for layer in layers)
        assert torch.equal(transformer(**inputs), expected)
        unfuse(transformer)
        assert all(layer.operation is layer.plain for layer in layers)


@pytest.mark.parametrize("fused", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize("stack", STACKS.values(), ids=STACKS.keys())
def test_both_forms_are_part_of_one_graph(stack, fused):
    transformer, inputs = tiny_transformer(stack, torch.float32)
    if fused:
        use_operators(transformer)
    with torch.no_grad():
        compiled = torch.compile(transformer, fullgraph=True, backend="eager")
        assert torch.equal(compiled(**inputs), transformer(**inputs))
