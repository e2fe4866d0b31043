"""FLUX.1-dev at its full size on a GPU, random weights in bfloat16, beside Diffusers eager and regionally compiled.

Printed for each size of picture: milliseconds a step (one forward), the share of the matrix-product ceiling measured in
the same run, kernel launches a block, and the error against Diffusers. All sides share one set of weights. It takes at
most eight minutes; what would begin too late is left out by name. Without Diffusers, Safelight is measured alone.

`--device cpu --layers tiny` runs the same code on the CPU at a size that means nothing.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.profiler import ProfilerActivity, profile

from benchmarks.common import (
    FLUX_DEV,
    FluxInputs,
    as_diffusers_calls,
    as_safelight_calls,
    as_tensor,
    begin,
    count_per_block,
    cpu_clock,
    default_dtype,
    diffusers_transformer,
    flux_inputs,
    interleaved,
    our_transformer,
    print_table,
    relative_error,
)
from safelight.families.flux.transformer import FluxArchitecture, FluxTransformer2DModel

TINY = FluxArchitecture(
    num_layers=2, num_single_layers=3, num_attention_heads=2, joint_attention_dim=64, guidance_embeds=True
)
PIXELS_A_TOKEN = 16
"""Along one side."""
BUDGET, LEAST_FOR_COMPILING = 480.0, 150.0
"""Seconds: of the whole run, and those that have to be left for a compiled side to begin."""
REFERENCE = "Diffusers"


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        architecture: of the transformer.
        device: `cuda` or `cpu`.
        sizes: pixels along one side of the pictures.
        num_text: tokens of text.
        matrix_size: rows and columns of the ceiling's matrices.
        rounds: rounds of A B B A.
        compiled: whether compiled sides are measured.
        deadline: on the monotonic clock.

    """

    architecture: FluxArchitecture
    device: str
    sizes: tuple[int, ...]
    num_text: int
    matrix_size: int
    rounds: int
    compiled: bool
    deadline: float

    def seconds_left(self) -> float:
        """Return how much of the budget is left."""
        return self.deadline - time.monotonic()


@dataclass(frozen=True)
class Side:
    """One way to run the transformer.

    Attributes:
        transformer: the module.
        is_ours: whose arguments it takes.
        compiled: whether its blocks are compiled.

    """

    transformer: nn.Module
    is_ours: bool
    compiled: bool

    def step(self, inputs: FluxInputs) -> Callable[[], Tensor]:
        """Return a function that runs one forward."""
        call = as_safelight_calls if self.is_ours else as_diffusers_calls
        forward, arguments = call(self.transformer), inputs.ours() if self.is_ours else inputs.diffusers()
        return lambda: as_tensor(forward(**arguments))


def event_clock(run: Callable[[], object]) -> float:
    """Return the seconds on the GPU's own clock."""
    begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    begun.record()
    run()
    ended.record()
    torch.cuda.synchronize()
    seconds: float = begun.elapsed_time(ended) / 1000
    return seconds


def ceiling(plan: Plan) -> float:
    """Return the FLOP/s of a large matrix product in bfloat16: nothing here can be faster."""
    size = plan.matrix_size
    left, right = (torch.randn(size, size, device=plan.device, dtype=torch.bfloat16) for _ in range(2))
    clock = clock_of(plan)
    for _ in range(3):
        clock(partial(torch.matmul, left, right))
    seconds = statistics.median(clock(partial(torch.matmul, left, right)) for _ in range(20))
    return 2 * size**3 / seconds


def clock_of(plan: Plan) -> Callable[[Callable[[], object]], float]:
    """Return the device's clock."""
    return event_clock if plan.device == "cuda" else cpu_clock


def forward_flops(architecture: FluxArchitecture, num_image: int, num_text: int) -> int:
    """Return the operations of one forward's matrix products, a multiplication and an addition each counting one.

    A token takes 12 C² weights in either kind of block: in two streams 4 C² of attention's projections and 8 C² of the
    MLP, in one stream 3 + 4 + 5. Attention adds S C for the scores and as much for the values.
    """
    dim, num_tokens = architecture.dim, num_image + num_text
    num_blocks = architecture.num_layers + architecture.num_single_layers
    in_blocks = num_blocks * (12 * dim**2 * num_tokens + 2 * num_tokens**2 * dim)
    modulation = dim**2 * (12 * architecture.num_layers + 3 * architecture.num_single_layers + 2)
    at_the_ends = dim * (2 * num_image * architecture.in_channels + num_text * architecture.joint_attention_dim)
    return 2 * (in_blocks + modulation + at_the_ends)


def why_no_reference() -> str:
    """Return why Diffusers cannot be imported; nothing if it can."""
    try:
        from diffusers import FluxTransformer2DModel as _  # noqa: F401
    except (ImportError, RuntimeError) as error:  # Diffusers turns a missing package of its own into the latter
        return str(error).splitlines()[0]
    return ""


def build_sides(plan: Plan) -> dict[str, Side]:
    """Return every side by its name, all over the same tensors."""
    architecture, device = plan.architecture, plan.device
    missing = why_no_reference()
    if missing:
        print(f"Diffusers is missing ({missing}): Safelight is measured alone\n")
        with default_dtype(torch.bfloat16), torch.device(device):
            weights = FluxTransformer2DModel(architecture).state_dict()
        reference = None
    else:
        reference = diffusers_transformer(architecture, torch.bfloat16, device)
        weights = reference.state_dict()
    sides = {} if reference is None else {REFERENCE: Side(reference, is_ours=False, compiled=False)}
    sides["Safelight"] = Side(our_transformer(architecture, weights), is_ours=True, compiled=False)
    if not plan.compiled:
        return sides
    if reference is not None:
        second = diffusers_transformer(architecture, torch.bfloat16, "meta")
        second.load_state_dict(weights, assign=True)
        second.compile_repeated_blocks(dynamic=False)
        sides[f"{REFERENCE}, blocks compiled"] = Side(second, is_ours=False, compiled=True)
    ours = our_transformer(architecture, weights)
    for block in (*ours.transformer_blocks, *ours.single_transformer_blocks):
        block.compile(dynamic=False)
    sides["Safelight, blocks compiled"] = Side(ours, is_ours=True, compiled=True)
    return sides


def num_launches(step: Callable[[], object], device: str) -> int:
    """Return the kernels that one call launches; on the CPU, its operations."""
    on_gpu = device == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        step()
        if on_gpu:
            torch.cuda.synchronize()
    events: Any = profiler.events()
    if not on_gpu:
        return sum(event.cpu_parent is None for event in events)
    return sum(
        event.device_type == DeviceType.CUDA
        and not event.is_user_annotation
        and not event.name.startswith(("Memcpy", "Memset"))
        for event in events
    )


def ready_steps(plan: Plan, sides: dict[str, Side], inputs: FluxInputs) -> dict[str, Callable[[], Tensor]]:
    """Run each side until it is warm; sides whose compilation would begin too late are left out."""
    torch.compiler.reset()
    steps = {}
    for name, side in sides.items():
        if side.compiled and plan.seconds_left() < LEAST_FOR_COMPILING:
            print(f"{name}: left out, {plan.seconds_left():.0f} s are left")
            continue
        begun = time.monotonic()
        step = side.step(inputs)
        for _ in range(3):
            step()
        if plan.device == "cuda":
            torch.cuda.synchronize()
        print(f"{name}: warm after {time.monotonic() - begun:.1f} s", flush=True)
        steps[name] = step
    return steps


def measure(plan: Plan, sides: dict[str, Side], size: int, peak: float) -> None:
    """Measure and print one size of picture."""
    side_tokens = size // PIXELS_A_TOKEN
    inputs = flux_inputs(plan.architecture, plan.num_text, side_tokens, side_tokens, torch.bfloat16, plan.device)
    flops = forward_flops(plan.architecture, side_tokens**2, plan.num_text)
    steps = ready_steps(plan, sides, inputs)
    seconds = interleaved(steps, plan.rounds, clock_of(plan))
    outputs = {name: step() for name, step in steps.items()}
    rows = []
    for name, step in steps.items():
        launches = count_per_block(sides[name].transformer, partial(num_launches, step, plan.device))
        ratio = error = "-"
        if REFERENCE in steps:
            ratio = f"{seconds[name] / seconds[REFERENCE]:.3f}"
            error = f"{relative_error(outputs[name], outputs[REFERENCE]):.1e}"
        share = flops / seconds[name] / peak
        rows.append(
            [name, f"{seconds[name] * 1000:.2f}", ratio, f"{share:.1%}", *(str(count) for count in launches), error]
        )
    print(f"\n{size}x{size}, {side_tokens**2} + {plan.num_text} tokens, {flops / 1e12:.3g} TFLOP a forward")
    counted = "launches" if plan.device == "cuda" else "operations"
    header = ["", "ms a step", "ratio", "of the ceiling", f"{counted}: two-stream", "one-stream", "rest", "difference"]
    print_table(header, rows)


def parse_layers(text: str) -> FluxArchitecture:
    """Return the architecture for `full`, `tiny`, or numbers of blocks such as `2,4` at full width."""
    if text in ("full", "tiny"):
        return FLUX_DEV if text == "full" else TINY
    try:
        double, single = (int(number) for number in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {text!r}; takes full, tiny, or two numbers such as 2,4") from None
    if min(double, single) < 2:
        raise argparse.ArgumentTypeError("at least two blocks of each kind, so that launches a block can be counted")
    return replace(FLUX_DEV, num_layers=double, num_single_layers=single)


def plan_of(arguments: argparse.Namespace, device: str, begun: float) -> Plan:
    """Return what the command line asks for; the tiny model gets tiny pictures."""
    tiny = arguments.layers == TINY
    sizes = (64, 32) if tiny else (1024, 512)
    return Plan(
        architecture=arguments.layers,
        device=device,
        sizes=sizes[-1:] if arguments.quick else sizes,
        num_text=16 if tiny else 512,
        matrix_size=256 if tiny else 8192,
        rounds=2 if arguments.quick else arguments.rounds,
        compiled=not arguments.skip_compile,
        deadline=begun + BUDGET,
    )


def main() -> None:
    """Measure what the command line asks for."""
    begun = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], help="cuda where there is one")
    parser.add_argument("--layers", type=parse_layers, default=FLUX_DEV, help="full (default), tiny, or such as 2,4")
    parser.add_argument("--skip-compile", action="store_true", help="measure no compiled sides")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of A B B A")
    arguments = begin(parser)
    if arguments.device != "cpu" and not torch.cuda.is_available():
        print("no CUDA device: nothing is measured. With one, this would be:", __doc__, sep="\n")
        return
    plan = plan_of(arguments, arguments.device or "cuda", begun)
    if plan.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        memory = properties.total_memory / 2**30
        print(f"{properties.name}, {memory:.0f} GiB, CUDA {torch.version.cuda}")
    peak = ceiling(plan)
    print(f"ceiling: {peak / 1e12:.4g} TFLOP/s, {plan.matrix_size}^3 in bfloat16\n", flush=True)
    sides = build_sides(plan)
    for size in plan.sizes:
        measure(plan, sides, size, peak)
    print(f"{time.monotonic() - begun:.0f} s in all")


if __name__ == "__main__":
    main()
