"""One denoising step, a transformer forward and the solver's update, beside Diffusers on the same weights.

Each family's blocks in a small stack, over about 1,088 tokens.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.common import (
    as_diffusers_calls,
    as_safelight_calls,
    as_tensor,
    begin,
    interleaved,
    print_table,
    relative_error,
)
from benchmarks.stacks import STACKS, Grid, Stack, num_tokens

QUICK: Grid = (1, 8, 8)
TARGET = 1.0


def denoising_step(
    stack: Stack, transformer: Callable[..., Any], arguments: dict[str, Any], num_calls: int
) -> Callable[[], object]:
    """Return a function that makes one step at each call, `num_calls` times at most, on a solver of its own."""
    solver = stack.new_solver()
    solver.set_timesteps(num_calls)
    timesteps = iter(solver.timesteps)
    latents, timestep = arguments["hidden_states"], arguments["timestep"]

    def step() -> None:
        t = next(timesteps)
        now = (t * stack.time_scale).to(timestep.dtype).expand(timestep.shape)
        velocity = as_tensor(transformer(**{**arguments, "timestep": now}))
        solver.step(velocity, t, latents, return_dict=False)

    return step


def measure(stack: Stack, grid: Grid, dtype: torch.dtype, rounds: int) -> list[str]:
    """Return the table's row for a dtype."""
    architecture = stack.small.architecture
    reference = stack.diffusers_transformer(architecture, dtype)
    inputs = stack.inputs(stack.small, grid, dtype)
    # The yardstick computes in float32 on the same weights and inputs, whatever dtype they were rounded to.
    yardstick = as_diffusers_calls(stack.diffusers_transformer(architecture, dtype).float())
    exact = as_tensor(yardstick(**inputs.to(torch.float32).for_diffusers()))
    ours = as_safelight_calls(stack.our_transformer(architecture, reference.state_dict()))
    theirs = as_diffusers_calls(reference)
    errors = [
        relative_error(as_tensor(theirs(**inputs.for_diffusers())), exact),
        relative_error(as_tensor(ours(**inputs.for_safelight())), exact),
    ]
    num_calls = 2 * rounds + 1
    seconds = interleaved(
        {
            "diffusers": denoising_step(stack, theirs, inputs.for_diffusers(), num_calls),
            "safelight": denoising_step(stack, ours, inputs.for_safelight(), num_calls),
        },
        rounds,
    )
    ratio = seconds["safelight"] / seconds["diffusers"]
    name = str(dtype).removeprefix("torch.")
    times = [f"{seconds[side] * 1000:.0f} ms" for side in ("diffusers", "safelight")]
    return [name, *times, f"{ratio:.3f}", *(f"{error:.1e}" for error in errors)]


def main() -> None:
    """Measure every family and dtype that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=[*STACKS, "all"], default="all")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of A B B A")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    arguments = begin(parser)
    for family, stack in STACKS.items():
        if arguments.family not in (family, "all"):
            continue
        grid = QUICK if arguments.quick else next(iter(stack.small.grids.values()))
        rounds = 1 if arguments.quick else arguments.rounds
        rows = [measure(stack, grid, getattr(torch, name), rounds) for name in arguments.dtypes]
        architecture = stack.small.architecture
        blocks = " + ".join(str(getattr(architecture, kind.field)) for kind in stack.blocks)
        tokens = f"{num_tokens(grid)} tokens and {stack.small.num_text} of text"
        print(f"{stack.name}-like: {blocks} blocks, {architecture.dim} wide, {tokens}; at most {TARGET:.1f} is wanted")
        print_table(["dtype", "Diffusers", "Safelight", "ratio", "error of Diffusers", "error of Safelight"], rows)


if __name__ == "__main__":
    main()
