"""A family's transformer at its full size in every layout of some devices: seconds a step, and what a rank sends.

With GPUs, one process each; random weights in bfloat16, a layout after the other, and the first on one device alone:

    torchrun --nproc-per-node 8 -m benchmarks.parallel --family flux

Without, nothing is timed: what a rank sends in a step is computed for `--devices`, and said to be.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from functools import partial
from itertools import product

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.common import print_table
from benchmarks.stacks import STACKS, Inputs, Size, Stack, num_tokens
from benchmarks.traffic import Forward, Shape, sent_by_forward, sent_by_step
from safelight.errors import InvalidParameterError
from safelight.parallel.calls import divide
from safelight.parallel.layout import AXES, ModelFacts, ParallelLayout, choose_layout
from safelight.parallel.mesh import Mesh, build_mesh, lone_mesh
from safelight.parallel.plans import model_facts
from safelight.parallel.sequence import apply_sequence_parallel
from safelight.parallel.tensor import connect_shards, shard_parameters

ROUNDS = 10
TIMEOUT = timedelta(minutes=5)


def possible_layouts(num_devices: int, facts: ModelFacts) -> Iterator[ParallelLayout]:
    """Yield every layout of so many devices that the model can have."""
    sizes = [size for size in range(1, num_devices + 1) if num_devices % size == 0]
    for combination in product(sizes, repeat=len(AXES)):
        layout = ParallelLayout(**dict(zip(AXES, combination, strict=True)))  # type: ignore[arg-type]
        if layout.num_devices == num_devices and is_possible(layout, facts):
            yield layout


def is_possible(layout: ParallelLayout, facts: ModelFacts) -> bool:
    """Say whether the model can have the layout."""
    try:
        layout.check(facts)
    except InvalidParameterError:
        return False
    return True


def on_meta(stack: Stack, size: Size) -> nn.Module:
    """Return the transformer without its weights."""
    with torch.device("meta"):
        return stack.transformer_cls(size.architecture)


def facts_of(stack: Stack, size: Size) -> ModelFacts:
    """Return what layouts are checked against, with weights of two bytes."""
    return model_facts(stack.name, on_meta(stack, size).to(torch.bfloat16), stack.num_branches, row_parallel_vae=False)


def predicted(stack: Stack, size: Size, layout: ParallelLayout, element_size: int = 2) -> tuple[int, float]:
    """Return calls and bytes that a rank sends in a step, by formula."""
    forward = Forward((num_tokens(next(iter(size.grids.values()))),), size.num_text)
    shape = Shape.of(vars(size.architecture))
    calls, num_bytes = 0, 0.0
    num_forwards = -(-stack.num_branches // layout.cfg)
    results = [forward.lengths[0] * shape.out_channels] * stack.num_branches
    parts = [sent_by_forward(shape, forward, layout, element_size)] * num_forwards
    for part in (*parts, sent_by_step(results, layout, element_size)):
        calls += sum(count for count, _ in part.values())
        num_bytes += sum(sent for _, sent in part.values())
    return calls, num_bytes


def share_of_parameters(stack: Stack, size: Size, layout: ParallelLayout) -> float:
    """Return which part of the transformer's parameters a rank has."""
    whole, own = on_meta(stack, size), on_meta(stack, size)
    shard_parameters(own, 0, layout.tp)
    counts = [sum(parameter.numel() for parameter in module.parameters()) for module in (own, whole)]
    return counts[0] / counts[1]


def divided(stack: Stack, size: Size, mesh: Mesh, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """Return this rank's part of the transformer with random weights."""
    module = on_meta(stack, size).to(dtype)
    shard_parameters(module, mesh.tp.rank, mesh.tp.size)
    module.to_empty(device=device)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.02)
    connect_shards(module, mesh.tp)
    apply_sequence_parallel(module, mesh)
    return module.eval().requires_grad_(False)


def step(module: nn.Module, inputs: Inputs, num_branches: int, mesh: Mesh) -> Callable[[], object]:
    """Return a function that runs the branches of a step."""

    def run(branches: Sequence[int]) -> list[Tensor]:
        return [module(**inputs.for_safelight()) for _ in branches]

    return torch.inference_mode()(partial(divide, range(num_branches), run, mesh.cfg))


def measured(stack: Stack, size: Size, mesh: Mesh, device: torch.device, rounds: int) -> tuple[float, int, int]:
    """Return the seconds of a step, and the calls and bytes that this rank sends in one."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    module = divided(stack, size, mesh, dtype, device)
    inputs = stack.inputs(size, next(iter(size.grids.values())), dtype, str(device))
    run = step(module, inputs, stack.num_branches, mesh)
    before = counted(mesh)
    run()
    calls, num_bytes = (after - first for after, first in zip(counted(mesh), before, strict=True))
    times = [wall_clock(run, device) for _ in range(rounds)]
    return statistics.median(times), calls, num_bytes


def counted(mesh: Mesh) -> tuple[int, int]:
    """Return the calls and bytes of this rank so far."""
    traffic = mesh.traffic().values()
    return sum(axis.num_calls for axis in traffic), sum(axis.num_bytes for axis in traffic)


def wall_clock(run: Callable[[], object], device: torch.device) -> float:
    """Return the seconds until the device is done."""
    begun = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begun


def print_prediction(stack: Stack, num_devices: int) -> None:
    """Print what layouts send, by formula."""
    size, facts, rows = stack.full, facts_of(stack, stack.full), []
    for layout in possible_layouts(num_devices, facts):
        calls, num_bytes = predicted(stack, size, layout)
        share = share_of_parameters(stack, size, layout)
        rows.append([layout.describe(), str(calls), f"{num_bytes / 2**20:.1f}", f"{share:.2f}"])
    print(f"{stack.name}, {next(iter(size.grids))}, {num_devices} devices. {choose_layout(num_devices, facts)}\n")
    print_table(["layout", "calls a step", "MiB a step and rank", "parameters a rank"], rows)


def print_measurement(stack: Stack, device: torch.device) -> None:
    """Print the seconds of a step in each layout of all ranks, and on one device."""
    size, facts, world = stack.full, facts_of(stack, stack.full), dist.get_world_size()
    chosen, rows, alone = choose_layout(world, facts).layout, [], 0.0
    meshes = (build_mesh(layout, TIMEOUT) for layout in possible_layouts(world, facts))
    for mesh in (lone_mesh(), *meshes):
        layout = mesh.layout
        seconds, calls, num_bytes = measured(stack, size, mesh, device, ROUNDS)
        alone = alone or seconds
        mark = ", chosen" if layout == chosen else ""
        figures = [f"{seconds * 1000:.1f}", f"{alone / seconds:.2f}", str(calls), f"{num_bytes / 2**20:.1f}"]
        rows.append([layout.describe() + mark, *figures])
        torch.cuda.empty_cache()
    if dist.get_rank() == 0:
        print(f"{stack.name}, {next(iter(size.grids))}, {world} x {torch.cuda.get_device_name()}\n")
        print_table(["layout", "ms a step", "times faster", "calls a step", "MiB a step and rank"], rows)


def main() -> None:
    """Measure where there are GPUs; compute elsewhere."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=STACKS, action="append", help="which; all by default")
    parser.add_argument("--devices", type=int, default=4, help="how many, where nothing is timed")
    parser.add_argument("--quick", action="store_true", help="two devices, where nothing is timed")
    arguments = parser.parse_args()
    stacks = [STACKS[name] for name in arguments.family or STACKS]
    if torch.cuda.is_available() and "LOCAL_RANK" in os.environ:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", timeout=TIMEOUT)
        for stack in stacks:
            print_measurement(stack, device)
        dist.destroy_process_group()
        return
    print("No ranks on GPUs: nothing is timed. Calls and bytes are by formula, with two bytes an element.\n")
    for stack in stacks:
        print_prediction(stack, 2 if arguments.quick else arguments.devices)


if __name__ == "__main__":
    main()
