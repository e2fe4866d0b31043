"""What the benchmarks share: the interleaved timer, the table, the machine's description, and both sides' calls."""

from __future__ import annotations

import argparse
import logging
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Clock = Callable[[Callable[[], object]], float]
"""Runs something once and returns the seconds it took."""

CPU_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "asimd", "bf16", "i8mm", "sve")
"""Processor flags that decide which kernels torch takes: x86's, then those of 64-bit Arm."""


def cpu_clock(run: Callable[[], object]) -> float:
    """Return the process's CPU seconds: what other processes take does not count."""
    begun = time.process_time()
    run()
    return time.process_time() - begun


def interleaved(sides: Mapping[str, Callable[[], object]], rounds: int, clock: Clock = cpu_clock) -> dict[str, float]:
    """Return the median seconds of each side.

    A round runs the sides forward and then backward (A B B A), so that a machine that slows down slows all of them.
    Each side runs once before, untimed.
    """
    samples: dict[str, list[float]] = {name: [] for name in sides}
    for run in sides.values():
        run()
    for _ in range(rounds):
        for name in (*sides, *reversed(list(sides))):
            samples[name].append(clock(sides[name]))
    return {name: statistics.median(times) for name, times in samples.items()}


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table in Markdown, aligned."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    for row in (header, ["-" * width for width in widths], *rows):
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |")
    print(flush=True)


def machine() -> str:
    """Describe the processor, its flags and torch, on one line."""
    info = cpu_info()
    model = info.get("model name", platform.processor() or platform.machine())
    flags = [flag for flag in CPU_FLAGS if flag in info.get("flags", info.get("Features", "")).split()]
    onednn = "with" if torch.backends.mkldnn.is_available() else "without"  # type: ignore[no-untyped-call]
    return (
        f"{model}, {os.cpu_count()} cores, flags {' '.join(flags) or 'unknown'}; "
        f"Python {platform.python_version()}, torch {torch.__version__} "
        f"({torch.backends.cpu.get_cpu_capability()}, {onednn} oneDNN, {torch.get_num_threads()} threads)"
    )


def cpu_info() -> dict[str, str]:
    """Return what Linux says of the first processor; nothing elsewhere."""
    path = Path("/proc/cpuinfo")
    if not path.is_file():
        return {}
    lines = path.read_text(encoding="utf-8").partition("\n\n")[0].splitlines()
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}


def begin(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Add `--quick`, parse the command line, keep torch to one thread, and print the machine.

    The libraries' warnings are left out, so that the output is the table.
    """
    parser.add_argument("--quick", action="store_true", help="fewer repetitions, smaller models: to see that it runs")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    print(machine(), end="\n\n", flush=True)
    return arguments


def as_diffusers_calls(transformer: nn.Module) -> Callable[..., Any]:
    """Return the call that a Diffusers pipeline makes."""
    return torch.no_grad()(transformer.__call__)


def as_safelight_calls(transformer: nn.Module) -> Callable[..., Any]:
    """Return the call that Safelight's executor makes."""
    return torch.inference_mode()(transformer.__call__)


def as_tensor(output: Any) -> Tensor:
    """Return the velocity, which Diffusers gives in a tuple."""
    tensor: Tensor = output[0] if isinstance(output, tuple) else output
    return tensor


def relative_error(value: Tensor, reference: Tensor) -> float:
    """Return the norm of the difference, over the reference's."""
    return float((value.double() - reference.double()).norm() / reference.double().norm())
