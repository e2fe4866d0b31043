"""What the benchmarks of transformers rest on: both sides are given the same, and operations are counted rightly."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import relative_error
from benchmarks.stacks import STACKS, num_tokens


@pytest.mark.parametrize("stack", STACKS.values(), ids=STACKS.keys())
def test_both_sides_compute_the_same(stack):
    size, grid = stack.tiny, next(iter(stack.tiny.grids.values()))
    reference = stack.diffusers_transformer(size.architecture)
    ours = stack.our_transformer(size.architecture, reference.state_dict())
    inputs = stack.inputs(size, grid, torch.float32)
    with torch.inference_mode():
        expected = reference(**inputs.for_diffusers())[0]
        assert relative_error(ours(**inputs.for_safelight()), expected) < 1e-5


@pytest.mark.parametrize("stack", STACKS.values(), ids=STACKS.keys())
def test_operations_are_those_of_the_full_size(stack):
    """But for the embedding of time, which is left out, and less than a ten-thousandth."""
    size, grid = stack.full, next(iter(stack.full.grids.values()))
    with torch.device("meta"):
        transformer = stack.transformer_cls(size.architecture)
    inputs = stack.inputs(size, grid, torch.float32, "meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        transformer(**inputs.for_safelight())
    counted = stack.forward_flops(size.architecture, num_tokens(grid), size.num_text)
    assert counted == pytest.approx(counter.get_total_flops(), rel=1e-4)


@pytest.mark.parametrize("stack", STACKS.values(), ids=STACKS.keys())
def test_blocks_are_counted(stack):
    """Kinds in order, then the rest; the transformer has its blocks again."""
    architecture = stack.tiny.architecture
    transformer = stack.random_transformer(architecture, torch.float32, "cpu")
    numbers = [len(getattr(transformer, kind.attribute)) for kind in stack.blocks]
    assert numbers == [getattr(architecture, kind.field) for kind in stack.blocks]
    weights = (10, 1000)

    def count():
        lengths = [len(getattr(transformer, kind.attribute)) for kind in stack.blocks]
        return 7 + sum(weight * length for weight, length in zip(weights, lengths, strict=False))

    assert stack.count_per_block(transformer, count) == [*weights[: len(stack.blocks)], 7]
    assert numbers == [len(getattr(transformer, kind.attribute)) for kind in stack.blocks]
