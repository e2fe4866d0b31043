"""Operations that would be kernels, counted in the blocks of each family at its real size; nothing is computed.

On the meta device, views not counted; RMSNorm and attention, which are one kernel each on a GPU, count as one, and so
does each fused operation.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.common import begin, print_table
from benchmarks.stacks import STACKS, Grid, Stack, num_tokens, use_operators

ONE_KERNEL = frozenset({torch.rms_norm, F.rms_norm, F.scaled_dot_product_attention})
NO_KERNEL = frozenset({"aten._unsafe_view", "aten.detach", "aten.empty", "aten.lift_fresh"})
"""Operations that move no data though their schema does not call them views."""


class OperationCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operations below it by name, views left out."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter()
        self.paused = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Count, and go on."""
        name = str(func.overloadpacket)
        if not self.paused and not func.is_view and name not in NO_KERNEL:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


class OneKernel(TorchFunctionMode):
    """Counts a call of a fused function as one operation, whatever the meta device makes of it."""

    def __init__(self, counter: OperationCounter) -> None:
        super().__init__()
        self.counter = counter

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Count once, and go on uncounted."""
        if func not in ONE_KERNEL or self.counter.paused:
            return func(*args, **(kwargs or {}))
        self.counter.counts[func.__name__] += 1
        self.counter.paused = True
        try:
            if func is F.scaled_dot_product_attention:
                query = args[0] if args else (kwargs or {})["query"]
                return torch.empty_like(query)  # a GPU's kernels lay their result out as the query is
            return func(*args, **(kwargs or {}))
        finally:
            self.counter.paused = False


def operations(transformer: Any, arguments: Mapping[str, Any]) -> Counter[str]:
    """Return the operations of one forward, by name."""
    counter = OperationCounter()
    with torch.no_grad(), counter, OneKernel(counter):
        transformer(**arguments)
    return counter.counts


def num_operations(transformer: Any, arguments: Mapping[str, Any]) -> int:
    """Return the number of operations of one forward."""
    return operations(transformer, arguments).total()


def blocks_and_rest(stack: Stack, transformer: Any, arguments: Mapping[str, Any]) -> tuple[list[int], int]:
    """Return the operations of a block of each kind, and of all that is no block."""
    *blocks, rest = stack.count_per_block(transformer, partial(num_operations, transformer, arguments))
    return blocks, rest


def mean_block(stack: Stack, architecture: Any, blocks: Sequence[int]) -> float:
    """Return the mean operations of all blocks of a model, of whatever kind."""
    numbers: list[int] = [getattr(architecture, kind.field) for kind in stack.blocks]
    return sum(number * count for number, count in zip(numbers, blocks, strict=True)) / sum(numbers)


def fused_transformer(stack: Stack, architecture: Any, weights: Mapping[str, Tensor]) -> nn.Module:
    """Return Safelight's transformer with every operation as one operator."""
    transformer = stack.our_transformer(architecture, weights)
    use_operators(transformer)
    return transformer


def measure(stack: Stack, grid: Grid, show_names: bool) -> None:
    """Count and print all sides of one family."""
    architecture, num_text = stack.full.architecture, stack.full.num_text
    inputs = stack.inputs(stack.full, grid, torch.bfloat16, "meta")
    reference = stack.diffusers_transformer(architecture, torch.bfloat16, "meta")
    weights: dict[str, Tensor] = reference.state_dict()
    sides = {
        "Diffusers": (reference, inputs.for_diffusers()),
        "Safelight": (stack.our_transformer(architecture, weights), inputs.for_safelight()),
        "Safelight, fused": (fused_transformer(stack, architecture, weights), inputs.for_safelight()),
    }
    table = []
    for name, (transformer, call) in sides.items():
        blocks, rest = blocks_and_rest(stack, transformer, call)
        mean = mean_block(stack, architecture, blocks)
        table.append([name, *map(str, blocks), f"{mean:.1f}", str(rest), str(num_operations(transformer, call))])
        if show_names:
            print(name, dict(operations(transformer, call).most_common()), end="\n\n")
    print(f"{stack.name}, bfloat16, {num_text} + {num_tokens(grid)} tokens: operations")
    print_table(["", *(kind.label for kind in stack.blocks), "mean block", "outside blocks", "forward"], table)


def main() -> None:
    """Count every family."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--names", action="store_true", help="print the whole forward's operations by name, too")
    arguments = begin(parser)
    for stack in STACKS.values():
        *_, grid = stack.full.grids.values()
        measure(stack, (1, 16, 16) if arguments.quick else grid, arguments.names)


if __name__ == "__main__":
    main()
