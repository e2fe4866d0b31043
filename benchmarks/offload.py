"""A family's transformer with blocks that stream from the host, beside the same one that lies on the device.

On a GPU, at the model's full size with random weights in bfloat16: milliseconds of a forward, how often as long as
resident, bytes a second that came from the host, and bytes on the device, for all, half and a quarter of the blocks
streaming. Where a forward takes as long as the longer of the resident one and its copies, they overlap wholly.

On the CPU, where host and device are one memory, a tiny stack: counts only, and whether bytes are equal.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.common import as_safelight_calls, as_tensor, begin, interleaved, print_table
from benchmarks.gpu import event_clock
from benchmarks.stacks import STACKS, Inputs
from safelight.acceleration.blocks import repeated_blocks
from safelight.acceleration.memory import CudaMemory, DeviceMemory
from safelight.acceleration.offload import (
    BlockStream,
    Packed,
    Stager,
    StreamedModule,
    WholeModule,
    streamed_bytes,
    tensors_of,
)
from tests.acceleration.memories import HostMemory

SHARES = (1.0, 0.5, 0.25)
"""Of the blocks that stream."""


@dataclass(frozen=True)
class Measured:
    """What one way to place the transformer gave.

    Attributes:
        num_bytes: on the device.
        copied: bytes copied for a forward.
        made: what the forward returned.
        seconds: of a forward; None where that would say nothing.

    """

    num_bytes: int
    copied: int
    made: Tensor
    seconds: float | None


def measure(
    transformer: nn.Module,
    inputs: Inputs,
    placed: WholeModule | StreamedModule,
    stream: BlockStream | None,
    rounds: int,
) -> Measured:
    """Run forwards of a transformer that is placed in one way; without rounds, count only."""
    forward = partial(as_safelight_calls(transformer), **inputs.for_safelight())
    placed.enter()
    made = as_tensor(forward()).cpu()
    before = stream.bytes_copied if stream is not None else 0
    forward()
    copied = (stream.bytes_copied if stream is not None else 0) - before
    seconds = interleaved({"forward": forward}, rounds, event_clock)["forward"] if rounds else None
    placed.leave()
    return Measured(placed.num_bytes, copied, made, seconds)


def place(
    transformer: nn.Module, share: float, memory: DeviceMemory
) -> tuple[WholeModule | StreamedModule, BlockStream | None]:
    """Return how the transformer comes to the device, with a share of its blocks streaming."""
    if not share:
        return WholeModule(Packed(tensors_of(transformer)), memory), None
    blocks = repeated_blocks(transformer)
    num_resident = len(blocks) - round(share * len(blocks))
    stream = BlockStream(blocks, num_resident, Stager(memory, streamed_bytes(blocks, num_resident)), memory)
    return StreamedModule(transformer, stream, memory), stream


def row(share: float, measured: Measured, resident: Measured) -> list[str]:
    """Return a row of the table."""
    cells = [
        f"{share:.0%} of the blocks stream" if share else "resident",
        f"{measured.num_bytes / 2**20:,.1f}",
        f"{measured.copied / 2**20:,.1f}",
        "yes" if torch.equal(measured.made, resident.made) else "no",
    ]
    if measured.seconds is None or resident.seconds is None:
        return [*cells, "not measured here", "", ""]
    speed = f"{measured.copied / measured.seconds / 1e9:.1f}"
    return [*cells, f"{measured.seconds * 1e3:.1f}", f"{measured.seconds / resident.seconds:.2f}", speed]


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stack", choices=STACKS, default="flux")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = begin(parser)
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.set_num_threads(os.cpu_count() or 1)  # pages of the host are copied by all cores, as in a server
    device = "cuda" if on_gpu else "cpu"
    stack = STACKS[arguments.stack]
    size = stack.full if on_gpu and not arguments.quick else stack.tiny
    dtype = torch.bfloat16 if on_gpu else torch.float32
    if not on_gpu:
        print("No GPU: host and device are one memory here, so that bytes are counted and nothing is timed.\n")
    transformer = stack.random_transformer(size.architecture, dtype, device).cpu()  # one core would draw for a minute
    name, grid = next(iter(size.grids.items()))
    inputs = stack.inputs(size, grid, dtype, device)
    memory: DeviceMemory = CudaMemory(torch.device("cuda")) if on_gpu else HostMemory()
    found = {
        share: measure(transformer, inputs, *place(transformer, share, memory), arguments.rounds if on_gpu else 0)
        for share in (0.0, *SHARES)
    }
    print(f"{stack.name}, {name}, {len(repeated_blocks(transformer))} blocks, {dtype}\n")
    header = ["weights", "MiB on the device", "MiB copied", "equal bytes", "ms", "times resident", "GB/s"]
    print_table(header, [row(share, measured, found[0.0]) for share, measured in found.items()])


if __name__ == "__main__":
    main()
