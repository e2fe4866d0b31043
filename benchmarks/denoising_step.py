"""One denoising step, a transformer forward and the solver's update, beside Diffusers on the same weights."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.common import (
    FluxInputs,
    as_diffusers_calls,
    as_safelight_calls,
    as_tensor,
    begin,
    diffusers_transformer,
    flux_inputs,
    interleaved,
    our_transformer,
    print_table,
    relative_error,
)
from safelight.families.flux.transformer import FluxArchitecture

STACK = FluxArchitecture(
    num_layers=2,
    num_single_layers=4,
    attention_head_dim=64,
    num_attention_heads=12,
    joint_attention_dim=768,
    guidance_embeds=True,
    axes_dims_rope=(8, 28, 28),
)
NUM_TEXT = 64
TARGET = 1.0


def denoising_step(transformer: Callable[..., Any], arguments: dict[str, Any], num_calls: int) -> Callable[[], object]:
    """Return a function that makes one step at each call, `num_calls` times at most, on a solver of its own."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(num_calls)
    timesteps = iter(scheduler.timesteps)
    latents = arguments["hidden_states"]

    def step() -> None:
        t = next(timesteps)
        velocity = as_tensor(transformer(**{**arguments, "timestep": t.expand(1).to(latents.dtype) / 1000}))
        scheduler.step(velocity, t, latents, return_dict=False)

    return step


def measure(inputs: FluxInputs, dtype: torch.dtype, rounds: int) -> list[str]:
    """Return the table's row for a dtype."""
    reference = diffusers_transformer(STACK, dtype)
    # The yardstick computes in float32 on the same weights and inputs, whatever dtype they were rounded to.
    exact_inputs = inputs.to(dtype).to(torch.float32).diffusers()
    exact = as_diffusers_calls(diffusers_transformer(STACK, dtype).float())(**exact_inputs)[0]
    ours = as_safelight_calls(our_transformer(STACK, reference.state_dict()))
    theirs = as_diffusers_calls(reference)
    inputs = inputs.to(dtype)
    errors = [
        relative_error(as_tensor(theirs(**inputs.diffusers())), exact),
        relative_error(as_tensor(ours(**inputs.ours())), exact),
    ]
    num_calls = 2 * rounds + 1
    seconds = interleaved(
        {
            "diffusers": denoising_step(theirs, inputs.diffusers(), num_calls),
            "safelight": denoising_step(ours, inputs.ours(), num_calls),
        },
        rounds,
    )
    ratio = seconds["safelight"] / seconds["diffusers"]
    name = str(dtype).removeprefix("torch.")
    times = [f"{seconds[side] * 1000:.0f} ms" for side in ("diffusers", "safelight")]
    return [name, *times, f"{ratio:.3f}", *(f"{error:.1e}" for error in errors)]


def main() -> None:
    """Measure both dtypes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="rounds of A B B A")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    arguments = begin(parser)
    rounds, side = (1, 8) if arguments.quick else (arguments.rounds, 32)
    inputs = flux_inputs(STACK, NUM_TEXT, side, side, torch.float32)
    rows = [measure(inputs, getattr(torch, name), rounds) for name in arguments.dtypes]
    print(f"FLUX-like: 2 + 4 blocks, {STACK.dim} wide, {NUM_TEXT + side * side} tokens; at most {TARGET:.1f} is wanted")
    print_table(["dtype", "Diffusers", "Safelight", "ratio", "error of Diffusers", "error of Safelight"], rows)


if __name__ == "__main__":
    main()
