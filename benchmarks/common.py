"""What the benchmarks share: the interleaved timer, the table, the machine's description, and a FLUX.1 of any size."""

from __future__ import annotations

import argparse
import logging
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from safelight.families.flux.transformer import FluxArchitecture, FluxTransformer2DModel
from safelight.layers.rotary import rotary_table

Clock = Callable[[Callable[[], object]], float]
"""Runs something once and returns the seconds it took."""

CPU_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "asimd", "bf16", "i8mm", "sve")
"""Processor flags that decide which kernels torch takes: x86's, then those of 64-bit Arm."""

FLUX_DEV = FluxArchitecture(guidance_embeds=True)


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


@dataclass(frozen=True)
class FluxInputs:
    """The arguments of one forward, as either side takes them.

    Attributes:
        hidden_states: [1, S_image, in_channels].
        encoder_hidden_states: [1, S_text, joint_attention_dim].
        pooled_projections: [1, pooled_projection_dim].
        timestep: [1], noise level in [0, 1].
        guidance: [1] float32.
        txt_ids, img_ids: [S, 3], positions.
        freqs_cis: complex64 [S_text + S_image, D/2], the rotary table of these positions.

    """

    hidden_states: Tensor
    encoder_hidden_states: Tensor
    pooled_projections: Tensor
    timestep: Tensor
    guidance: Tensor
    txt_ids: Tensor
    img_ids: Tensor
    freqs_cis: Tensor

    def common(self) -> dict[str, Tensor]:
        """Return what both sides take."""
        return {
            "hidden_states": self.hidden_states,
            "encoder_hidden_states": self.encoder_hidden_states,
            "pooled_projections": self.pooled_projections,
            "timestep": self.timestep,
            "guidance": self.guidance,
        }

    def ours(self) -> dict[str, Tensor]:
        """Return the arguments of Safelight's transformer; its rotary table is made once a request."""
        return {**self.common(), "freqs_cis": self.freqs_cis}

    def diffusers(self) -> dict[str, Any]:
        """Return the arguments of Diffusers' transformer; it makes its rotary table at every step."""
        return {**self.common(), "txt_ids": self.txt_ids, "img_ids": self.img_ids, "return_dict": False}

    def to(self, dtype: torch.dtype) -> FluxInputs:
        """Return the same inputs with activations in another dtype."""
        names = ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep")
        return replace(self, **{name: getattr(self, name).to(dtype) for name in names})


def flux_inputs(
    architecture: FluxArchitecture, num_text: int, rows: int, columns: int, dtype: torch.dtype, device: str = "cpu"
) -> FluxInputs:
    """Return random inputs for `num_text` tokens of text and a picture of `rows` times `columns` tokens."""
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    grid = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).float()
    img_ids = torch.cat((torch.zeros(len(grid), 1), grid), dim=1).to(device)
    txt_ids = torch.zeros(num_text, 3, device=device)
    return FluxInputs(
        hidden_states=noise(1, rows * columns, architecture.in_channels),
        encoder_hidden_states=noise(1, num_text, architecture.joint_attention_dim),
        pooled_projections=noise(1, architecture.pooled_projection_dim),
        timestep=torch.tensor([0.7], device=device, dtype=dtype),
        guidance=torch.tensor([3.5], device=device),
        txt_ids=txt_ids,
        img_ids=img_ids,
        freqs_cis=rotary_table(torch.cat((txt_ids, img_ids)), architecture.axes_dims_rope),
    )


def diffusers_transformer(
    architecture: FluxArchitecture, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> Any:
    """Return Diffusers' transformer with random weights."""
    from diffusers import FluxTransformer2DModel as Reference

    torch.manual_seed(0)
    with default_dtype(dtype), torch.device(device):
        return Reference(**asdict(architecture)).eval().requires_grad_(False)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Make `dtype` that of fresh parameters, so that a large model never exists in another."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def our_transformer(architecture: FluxArchitecture, weights: Mapping[str, Tensor]) -> FluxTransformer2DModel:
    """Return Safelight's transformer over the very tensors of a state dict; every key has to fit."""
    with torch.device("meta"):
        transformer = FluxTransformer2DModel(architecture)
    transformer.load_state_dict(dict(weights), assign=True)
    return transformer.eval().requires_grad_(False)


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


def count_per_block(transformer: Any, count: Callable[[], int]) -> tuple[int, int, int]:
    """Return what `count` counts in a block of two streams, in one of one stream, and in all that is no block.

    Both sides' transformers name their blocks alike; for the time of a count they have one or two of each.
    """
    double, single = transformer.transformer_blocks, transformer.single_transformer_blocks

    def counted(num_double: int, num_single: int) -> int:
        transformer.transformer_blocks = nn.ModuleList(list(double)[:num_double])
        transformer.single_transformer_blocks = nn.ModuleList(list(single)[:num_single])
        return count()

    try:
        least, with_double, with_single = counted(1, 1), counted(2, 1), counted(1, 2)
    finally:
        transformer.transformer_blocks, transformer.single_transformer_blocks = double, single
    in_double, in_single = with_double - least, with_single - least
    return in_double, in_single, least - in_double - in_single
