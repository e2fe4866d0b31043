"""A family's transformer at its full size on a GPU, beside Diffusers eager and regionally compiled.

FLUX.1-dev, Qwen-Image or Wan 2.1 1.3B; random weights in bfloat16, and in float32 where the model keeps it. First the
ceilings: a large matrix product, and a large copy. Then every fused operation, on the arguments that the model gives
it: its error and the plain form's, both against float64, and the time of each. Then for each size of what is made, and
each way to run it: milliseconds a step (one forward, or two with classifier-free guidance), seconds for all steps of a
picture or video, the share of the matrix-product ceiling, kernel launches a block, and the difference from Diffusers in
the same dtype. Safelight runs plain, fused, compiled, and fused and compiled. All sides share one set of weights. It
takes at most eight minutes; what would begin too late is left out by name. Without Diffusers, Safelight is measured
alone.

`--device cpu --layers tiny` runs the same code on the CPU at a size that means nothing.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.profiler import ProfilerActivity, profile

from benchmarks.common import (
    as_diffusers_calls,
    as_safelight_calls,
    as_tensor,
    begin,
    cpu_clock,
    interleaved,
    print_table,
    relative_error,
)
from benchmarks.stacks import STACKS, Grid, Inputs, Size, Stack, num_tokens, unfuse
from safelight.acceleration.fused import fusion
from safelight.acceleration.fused.fusion import fuse
from safelight.acceleration.fused.operations import OPERATIONS
from safelight.attention import Attention, set_attention_backend

BUDGET, LEAST_FOR_COMPILING = 480.0, 150.0
"""Seconds: of the whole run, and those that have to be left for a compiled side to begin."""
REFERENCE = "Diffusers"
NUM_STEPS = {"flux": 28, "qwen_image": 50, "wan": 50}
"""Steps of a picture or video, as the models are used."""


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        stack: the family's.
        size: of its transformer and of what is made.
        device: `cuda` or `cpu`.
        matrix_size: rows and columns of the ceiling's matrices.
        rounds: rounds of A B B A.
        compiled: whether compiled sides are measured.
        attention: the backend of Safelight's sides.
        num_steps: of a picture or video.
        deadline: on the monotonic clock.

    """

    stack: Stack
    size: Size
    device: str
    matrix_size: int
    rounds: int
    compiled: bool
    attention: str
    num_steps: int
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

    def forward(self, inputs: Inputs) -> Callable[[], Tensor]:
        """Return a function that runs one forward."""
        call = as_safelight_calls if self.is_ours else as_diffusers_calls
        forward = call(self.transformer)
        arguments = inputs.for_safelight() if self.is_ours else inputs.for_diffusers()
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


def memory_ceiling(plan: Plan) -> float:
    """Return the bytes a second that a large copy reads and writes: operations between matrix products end there."""
    source = torch.empty(plan.matrix_size**2 * 8, device=plan.device, dtype=torch.bfloat16)
    target, clock = torch.empty_like(source), clock_of(plan)
    for _ in range(3):
        clock(partial(target.copy_, source))
    return 2 * source.nbytes / statistics.median(clock(partial(target.copy_, source)) for _ in range(20))


def clock_of(plan: Plan) -> Callable[[Callable[[], object]], float]:
    """Return the device's clock."""
    return event_clock if plan.device == "cuda" else cpu_clock


def why_no_reference() -> str:
    """Return why Diffusers cannot be imported; nothing if it can."""
    try:
        from diffusers import ModelMixin as _  # noqa: F401
    except (ImportError, RuntimeError) as error:  # Diffusers turns a missing package of its own into the latter
        return str(error).splitlines()[0]
    return ""


def build_sides(plan: Plan) -> dict[str, Side]:
    """Return every side by its name, all over the same tensors."""
    stack, architecture, reference = plan.stack, plan.size.architecture, None
    missing = why_no_reference()
    if missing:
        print(f"Diffusers is missing ({missing}): Safelight is measured alone\n")
        weights = stack.random_transformer(architecture, torch.bfloat16, plan.device).state_dict()
    else:
        reference = stack.diffusers_transformer(architecture, torch.bfloat16, plan.device)
        weights = reference.state_dict()
    sides = {} if reference is None else {REFERENCE: Side(reference, is_ours=False, compiled=False)}
    plain, fused = (our_transformer(plan, weights) for _ in range(2))
    sides["Safelight"] = Side(plain, is_ours=True, compiled=False)
    report = fuse(fused, torch.device(plan.device), torch.bfloat16)
    print(f"{report}\n", flush=True)
    if report.num_fused:
        sides["Safelight, fused"] = Side(fused, is_ours=True, compiled=False)
    if not plan.compiled:
        return sides
    if reference is not None:
        second = copy.deepcopy(reference, {id(parameter): parameter for parameter in reference.parameters()})
        second.compile_repeated_blocks(dynamic=False)
        sides[f"{REFERENCE}, blocks compiled"] = Side(second, is_ours=False, compiled=True)
    for name in [name for name, side in sides.items() if side.is_ours]:
        ours = our_transformer(plan, weights)
        if sides[name].transformer is fused:
            fuse(ours, torch.device(plan.device), torch.bfloat16)
        for kind in stack.blocks:
            for block in getattr(ours, kind.attribute):
                block.compile(dynamic=False)
        sides[f"{name}, blocks compiled"] = Side(ours, is_ours=True, compiled=True)
    return sides


def our_transformer(plan: Plan, weights: Mapping[str, Tensor]) -> nn.Module:
    """Return Safelight's transformer over the weights, with the backend of attention that was asked for."""
    transformer = plan.stack.our_transformer(plan.size.architecture, weights)
    set_attention_backend(transformer, plan.attention, plan.device, torch.bfloat16)
    return transformer


def recorded_calls(side: Side, inputs: Inputs) -> dict[tuple[str, tuple[int, ...]], tuple[Any, ...]]:
    """Return the arguments of an operation's first call in a forward, by its name and its first argument's shape."""
    calls: dict[tuple[str, tuple[int, ...]], tuple[Any, ...]] = {}

    def recording(plain: Callable[..., Any], *arguments: Any) -> Any:
        calls.setdefault((plain.__name__, tuple(arguments[0].shape)), arguments)
        return plain(*arguments)

    for layer in fusion.fusable_layers(side.transformer):
        layer.operation = partial(recording, layer.plain)
    side.forward(inputs)()
    unfuse(side.transformer)
    return calls


def measure_operations(plan: Plan, side: Side, inputs: Inputs, bandwidth: float) -> bool:
    """Measure and print every operation of a forward in both forms, on the model's own arguments.

    Returns:
        whether each fused form is as exact as `fuse` asks.

    """
    rows = []
    for (name, shape), arguments in recorded_calls(side, inputs).items():
        operation = OPERATIONS[name]
        with torch.inference_mode():
            results, usual, exact = (
                fusion.as_tuple(computed)
                for computed in (
                    operation.fused(*arguments),
                    operation.plain(*arguments),
                    operation.plain(*map(fusion.in_float64, arguments)),
                )
            )
            judged = [fusion.judge(*each) for each in zip(results, usual, exact, strict=True)]
            forms = {"plain": partial(operation.plain, *arguments), "fused": partial(operation.fused, *arguments)}
            seconds = interleaved(forms, plan.rounds, clock_of(plan))
        tensors = [tensor for tensor in arguments if isinstance(tensor, Tensor)]
        moved = sum(tensor.nbytes for tensor in (*tensors, *results))
        rows.append(
            [
                f"{name} {list(shape)}",
                f"{seconds['plain'] * 1e6:.0f}",
                f"{seconds['fused'] * 1e6:.0f}",
                f"{moved / seconds['fused'] / bandwidth:.0%}",
                f"{max(plain_error for _, plain_error, _ in judged):.1e}",
                f"{max(error for error, _, _ in judged):.1e}",
                "yes" if all(within for _, _, within in judged) else "NO",
            ]
        )
    header = ["operation", "us plain", "us fused", "of the copy's bandwidth", "error plain", "error fused", "within"]
    print_table(header, rows)
    return all(row[-1] == "yes" for row in rows)


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


def as_step(stack: Stack, forward: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Return a function that runs the forwards of one step, and returns what the last gave."""

    def step() -> Tensor:
        for _ in range(stack.num_branches - 1):
            forward()
        return forward()

    return step


def ready_steps(plan: Plan, sides: dict[str, Side], inputs: Inputs) -> dict[str, Callable[[], Tensor]]:
    """Run each side until it is warm; sides whose compilation would begin too late are left out."""
    torch.compiler.reset()
    steps = {}
    for name, side in sides.items():
        if side.compiled and plan.seconds_left() < LEAST_FOR_COMPILING:
            print(f"{name}: left out, {plan.seconds_left():.0f} s are left")
            continue
        begun = time.monotonic()
        forward = side.forward(inputs)
        for _ in range(3):
            forward()
        if plan.device == "cuda":
            torch.cuda.synchronize()
        print(f"{name}: warm after {time.monotonic() - begun:.1f} s", flush=True)
        steps[name] = as_step(plan.stack, forward)
    return steps


def measure(plan: Plan, sides: dict[str, Side], made: str, grid: Grid, peak: float) -> None:
    """Measure and print one size of what is made."""
    stack, size = plan.stack, plan.size
    inputs = stack.inputs(size, grid, torch.bfloat16, plan.device)
    flops = stack.forward_flops(size.architecture, num_tokens(grid), size.num_text)
    steps = ready_steps(plan, sides, inputs)
    seconds = interleaved(steps, plan.rounds, clock_of(plan))
    outputs = {name: step() for name, step in steps.items()}
    rows = []
    for name in steps:
        forward = sides[name].forward(inputs)
        launches = stack.count_per_block(sides[name].transformer, partial(num_launches, forward, plan.device))
        ratio = error = "-"
        if REFERENCE in steps:
            ratio = f"{seconds[name] / seconds[REFERENCE]:.3f}"
            error = f"{relative_error(outputs[name], outputs[REFERENCE]):.1e}"
        share = stack.num_branches * flops / seconds[name] / peak
        times = [f"{seconds[name] * 1000:.2f}", f"{seconds[name] * plan.num_steps:.2f}"]
        rows.append([name, *times, ratio, f"{share:.1%}", *(str(count) for count in launches), error])
    print(f"\n{made}, {num_tokens(grid)} + {size.num_text} tokens, {flops / 1e12:.3g} TFLOP a forward", end="")
    print(f", {stack.num_branches} a step")
    counted = "launches" if plan.device == "cuda" else "operations"
    first, *others = (kind.label for kind in stack.blocks)
    header = [
        "",
        "ms a step",
        f"s for {plan.num_steps} steps",
        "ratio",
        "of the ceiling",
        f"{counted}: {first}",
        *others,
        "rest",
        "difference",
    ]
    print_table(header, rows)


def size_of(stack: Stack, layers: str) -> Size:
    """Return the size for `full`, `tiny`, or numbers of blocks, one a kind, such as `2,4`, at full width."""
    if layers in ("full", "tiny"):
        return stack.full if layers == "full" else stack.tiny
    fields = [kind.field for kind in stack.blocks]
    try:
        numbers = dict(zip(fields, (int(number) for number in layers.split(",")), strict=True))
    except ValueError:
        raise SystemExit(f"--layers: got {layers!r}; takes full, tiny, or {len(fields)} numbers of blocks") from None
    if min(numbers.values()) < 2:
        raise SystemExit("--layers: at least two blocks of each kind, so that launches a block can be counted")
    return replace(stack.full, architecture=replace(stack.full.architecture, **numbers))


def plan_of(arguments: argparse.Namespace, device: str, begun: float) -> Plan:
    """Return what the command line asks for; the tiny model makes tiny things."""
    stack = STACKS[arguments.family]
    size = size_of(stack, arguments.layers)
    if arguments.quick:
        size = replace(size, grids=dict(list(size.grids.items())[-1:]))
    return Plan(
        stack=stack,
        size=size,
        device=device,
        matrix_size=256 if arguments.layers == "tiny" else 8192,
        rounds=2 if arguments.quick else arguments.rounds,
        compiled=not arguments.skip_compile,
        attention=arguments.attention,
        num_steps=NUM_STEPS[arguments.family],
        deadline=begun + BUDGET,
    )


def main() -> None:
    """Measure what the command line asks for."""
    begun = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], help="cuda where there is one")
    parser.add_argument("--family", choices=list(STACKS), default="flux")
    parser.add_argument("--layers", default="full", help="full (default), tiny, or numbers of blocks such as 2,4")
    parser.add_argument("--skip-compile", action="store_true", help="measure no compiled sides")
    parser.add_argument("--attention", default="auto", help="Safelight's attention backend")
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
    bandwidth = memory_ceiling(plan)
    print(
        f"ceilings: {peak / 1e12:.4g} TFLOP/s, {plan.matrix_size}^3 in bfloat16; {bandwidth / 1e12:.3g} TB/s, a copy\n"
    )
    sides = build_sides(plan)
    chosen = {layer.backend.name for layer in sides["Safelight"].transformer.modules() if isinstance(layer, Attention)}
    print(f"attention: {', '.join(sorted(chosen))}\n", flush=True)
    first = next(iter(plan.size.grids.values()))
    inputs = plan.stack.inputs(plan.size, first, torch.bfloat16, plan.device)
    within = measure_operations(plan, sides["Safelight"], inputs, bandwidth)
    for made, grid in plan.size.grids.items():
        measure(plan, sides, made, grid, peak)
    print(f"{time.monotonic() - begun:.0f} s in all")
    if not within:
        raise SystemExit("a fused operation is not within its bound")


if __name__ == "__main__":
    main()
