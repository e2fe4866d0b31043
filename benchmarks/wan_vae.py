"""Decoding a video with Wan's VAE: memory and time beside Diffusers' own decode, on the same random weights.

Each run is a process of its own. Its memory is what the process grew by at most while it decoded, kernels' scratch
space included, as Linux counts it. Tensors alone are counted as well, without computing: on the meta device.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.common import begin, print_table, relative_error
from safelight.acceleration.activations import count_peak
from safelight.layers.causal_vae import CausalDecoder

SIDES = ("diffusers", "safelight")
TARGETS = {"memory": 0.5, "time": 1.1}
MODELS: dict[str, dict[str, Any]] = {
    "Wan 2.1": {},
    "Wan 2.2 TI2V-5B": {
        "base_dim": 160,
        "decoder_base_dim": 256,
        "z_dim": 48,
        "is_residual": True,
        "patch_size": 2,
        "in_channels": 12,
        "out_channels": 12,
        "scale_factor_spatial": 16,
        "latents_mean": [0.0] * 48,
        "latents_std": [1.0] * 48,
    },
}


def make_vae(model: str, quick: bool) -> Any:
    """Return the VAE with random weights; of small width for a quick look."""
    from diffusers import AutoencoderKLWan

    torch.manual_seed(0)
    smaller = {"base_dim": 8, "decoder_base_dim": 8} if quick else {}
    return AutoencoderKLWan(**{**MODELS[model], **smaller}).eval().requires_grad_(False)


def decoding(side: str, vae: Any) -> Callable[[Tensor], Tensor]:
    """Return the function by which a side decodes latents [1, C, T, H, W] to pixels [1, 3, T, H, W]."""
    if side == "diffusers":
        return lambda latents: vae.decode(latents, return_dict=False)[0]
    decoder = CausalDecoder(vae)

    def decode(latents: Tensor) -> Tensor:
        cache: dict[str, list[Any]] = {}
        frames = [frame for index in range(latents.shape[2]) for frame in decoder.decode(latents[:, :, [index]], cache)]
        return torch.stack(frames, dim=2)

    return decode


def latents_of(vae: Any, num_frames: int, size: int, device: str = "cpu") -> Tensor:
    """Return noise for as many frames of size by size pixels."""
    side, generator = size // vae.config.scale_factor_spatial, torch.Generator().manual_seed(0)
    shape = (1, vae.config.z_dim, (num_frames - 1) // 4 + 1, side, side)
    return torch.randn(shape, generator=generator).to(device)


def resident() -> tuple[int, int]:
    """Return the bytes that this process holds, and the most that it held."""
    status = Path("/proc/self/status").read_text()
    now, most = (int(re.findall(rf"{name}:\s+(\d+) kB", status)[0]) * 1024 for name in ("VmRSS", "VmHWM"))
    return now, most


def run_one(arguments: argparse.Namespace) -> None:
    """Decode once; print bytes and seconds, and write the pixels."""
    vae = make_vae(arguments.model, arguments.quick)
    decode = decoding(arguments.side, vae)
    with torch.inference_mode():
        decode(latents_of(vae, 1, 64))
        Path("/proc/self/clear_refs").write_text("5")  # the most held is counted from here
        before, begun = resident()[0], time.process_time()
        pixels = decode(latents_of(vae, arguments.frames, arguments.size))
        seconds, peak = time.process_time() - begun, resident()[1] - before
    save_file({"pixels": pixels.contiguous()}, arguments.pixels)
    print(json.dumps({"bytes": peak, "seconds": seconds}))


def counted(side: str, arguments: argparse.Namespace, model: str) -> int:
    """Return the most bytes in tensors, weights not counted."""
    with torch.device("meta"):
        vae = make_vae(model, arguments.quick)
    decode, latents = decoding(side, vae), latents_of(vae, arguments.frames, arguments.size, "meta")
    return count_peak(lambda: decode(latents))


@contextmanager
def children(arguments: argparse.Namespace, model: str) -> Iterator[Callable[[str], dict[str, Any]]]:
    """Give a function that runs a side in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:

        def run(side: str) -> dict[str, Any]:
            pixels = Path(folder) / f"{side}.safetensors"
            command = [sys.executable, "-m", "benchmarks.wan_vae", "--side", side, "--model", model]
            command += ["--frames", str(arguments.frames), "--size", str(arguments.size), "--pixels", str(pixels)]
            command += ["--quick"] if arguments.quick else []
            printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            return {**json.loads(printed.splitlines()[-1]), "pixels": load_file(pixels)["pixels"]}

        yield run


def measure(arguments: argparse.Namespace, model: str) -> list[str]:
    """Return the table's row of a model: the least of the runs, in the order A B B A."""
    with children(arguments, model) as run:
        runs = [(side, run(side)) for _ in range(arguments.rounds) for side in (*SIDES, *reversed(SIDES))]
    memory, seconds = (
        [min(made[what] for name, made in runs if name == side) for side in SIDES] for what in ("bytes", "seconds")
    )
    tensors = [counted(side, arguments, model) for side in SIDES]
    pixels = dict(runs)
    error = relative_error(pixels["safelight"]["pixels"], pixels["diffusers"]["pixels"])
    row = [model]
    for sizes in (memory, tensors):
        row += [*(f"{size / 1e6:.0f} MB" for size in sizes), f"{sizes[1] / sizes[0]:.2f}"]
    return [*row, *(f"{taken:.1f} s" for taken in seconds), f"{seconds[1] / seconds[0]:.2f}", f"{error:.1e}"]


def main() -> None:
    """Measure both models, or, as a child, one run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, default=17)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=1, help="rounds of A B B A")
    parser.add_argument("--model", choices=list(MODELS), help="only this one")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--pixels", type=Path, help=argparse.SUPPRESS)
    arguments = begin(parser)
    if arguments.side:
        run_one(arguments)
        return
    rows = [measure(arguments, model) for model in ([arguments.model] if arguments.model else MODELS)]
    wanted = f"{TARGETS['memory']:.1f} of the memory and {TARGETS['time']:.1f} of the time"
    print(f"{arguments.frames} frames of {arguments.size}x{arguments.size}, float32; at most {wanted} is wanted")
    sides = ["Diffusers", "Safelight", "ratio"]
    print_table(
        ["decode", *(f"memory: {side}" for side in sides), *(f"tensors: {side}" for side in sides), *sides, "error"],
        rows,
    )


if __name__ == "__main__":
    main()
