"""Decoding in bands beside Diffusers' undivided decode and its tiling: time, live bytes and error, on the same weights.

Tiles are half a side. Time is process CPU time, one thread, A B B A, medians. Bytes are those of tensors alive at one
time, weights not counted, on the meta device: without what a kernel needs for itself.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import begin, interleaved, print_table, relative_error
from benchmarks.wan_vae import MODELS as WAN_MODELS
from safelight.acceleration.activations import count_peak
from safelight.loading.vaes import decode_in_bands
from tests.acceleration.vaes import decoded

TARGETS = {"memory": 0.45, "time": 1.10, "error": 1e-5}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SIDES = ("diffusers", "bands", "tiling")
KL_OPTIONS = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 16,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}


@dataclass(frozen=True)
class Model:
    """A VAE and what it decodes.

    Attributes:
        class_name: in Diffusers.
        options: of its constructor, beside the defaults.
        narrow: the same for a quick look.
        num_frames: of the video, or 1.
        size: of a side, in pixels.
        scale: pixels of a latent pixel's side.

    """

    class_name: str
    options: Mapping[str, Any]
    narrow: Mapping[str, Any]
    num_frames: int
    size: int
    scale: int = 8


NARROW = {"base_dim": 8}
MODELS = {
    "AutoencoderKL": Model("AutoencoderKL", KL_OPTIONS, {"block_out_channels": (32, 32, 64, 64)}, 1, 512),
    "Wan 2.1": Model("AutoencoderKLWan", {}, NARROW, 17, 256),
    "Wan 2.2": Model(
        "AutoencoderKLWan", WAN_MODELS["Wan 2.2 TI2V-5B"], {**NARROW, "decoder_base_dim": 8}, 17, 256, scale=16
    ),
    "Qwen-Image": Model("AutoencoderKLQwenImage", {}, NARROW, 1, 512),
}


def make_vae(model: Model, quick: bool, dtype: torch.dtype, device: str = "cpu") -> Any:
    """Return the VAE with random weights."""
    import diffusers

    torch.manual_seed(0)
    options = {**model.options, **(model.narrow if quick else {})}
    with torch.device(device):
        return getattr(diffusers, model.class_name)(**options).to(dtype).eval().requires_grad_(False)


def latents_of(vae: Any, model: Model, size: int, dtype: torch.dtype, device: str = "cpu") -> Tensor:
    """Return noise in the shape of the latents."""
    side, generator = size // model.scale, torch.Generator().manual_seed(0)
    if model.class_name == "AutoencoderKL":
        shape: tuple[int, ...] = (1, vae.config.latent_channels, side, side)
    else:
        shape = (1, vae.config.z_dim, (model.num_frames - 1) // 4 + 1, side, side)
    return torch.randn(shape, generator=generator).to(device, dtype)


def with_tiles(vae: Any, size: int) -> Any:
    """Let Diffusers decode in tiles of this many pixels a side, which overlap by a quarter."""
    if type(vae).__name__ == "AutoencoderKL":
        vae.enable_tiling()
        vae.tile_sample_min_size, vae.tile_latent_min_size = size, size // 8
    else:
        vae.enable_tiling(size, size, size * 3 // 4, size * 3 // 4)
    return vae


def decoders(vae: Any, size: int, rows: int | None) -> dict[str, Callable[[Tensor], Tensor]]:
    """Return each side's decode, of latents to pixels [C, T, H, W] (Diffusers' AutoencoderKL: [C, H, W])."""
    banded = decode_in_bands(copy.deepcopy(vae), rows)
    tiled = with_tiles(copy.deepcopy(vae), size // 2)
    return {
        "diffusers": lambda latents: vae.decode(latents, return_dict=False)[0][0],
        "bands": lambda latents: decoded(banded, latents),
        "tiling": lambda latents: tiled.decode(latents, return_dict=False)[0][0],
    }


def measure(name: str, arguments: argparse.Namespace) -> list[str]:
    """Return a model's row of the table."""
    model, dtype = MODELS[name], DTYPES[arguments.dtype]
    size = arguments.size or (128 if arguments.quick else model.size)
    meta = make_vae(model, arguments.quick, dtype, "meta")
    latents = latents_of(meta, model, size, dtype, "meta")
    sides = decoders(meta, size, arguments.rows)
    peaks = {side: count_peak(lambda side=side: sides[side](latents)) for side in SIDES}  # type: ignore[misc]
    vae = make_vae(model, arguments.quick, dtype)
    latents = latents_of(vae, model, size, dtype)
    sides = decoders(vae, size, arguments.rows)
    with torch.inference_mode():
        expected = sides["diffusers"](latents)
        errors = [relative_error(sides[side](latents).view(expected.shape), expected) for side in SIDES[1:]]
        seconds = interleaved({side: lambda side=side: sides[side](latents) for side in SIDES}, arguments.rounds)  # type: ignore[misc]
    frames = f"{model.num_frames} frames of " if model.num_frames > 1 else ""
    row = [f"{name}, {frames}{size}x{size}"]
    row += [f"{peaks['diffusers'] / 1e6:.0f} MB", *(f"{peaks[side] / peaks['diffusers']:.2f}" for side in SIDES[1:])]
    row += [f"{seconds['diffusers']:.1f} s", *(f"{seconds[side] / seconds['diffusers']:.2f}" for side in SIDES[1:])]
    return [*row, *(f"{error:.1e}" for error in errors)]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=list(MODELS), help="only this one")
    parser.add_argument("--size", type=int, help="of a side, in pixels; each model's own unless given")
    parser.add_argument("--rows", type=int, help="of a band, at most")
    parser.add_argument("--rounds", type=int, default=1, help="rounds of A B B A")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32")
    arguments = begin(parser)
    wanted = f"{TARGETS['memory']} of the memory, {TARGETS['time']:.2f} of the time and an error of {TARGETS['error']}"
    print(f"{arguments.dtype}; of bands at most {wanted} is wanted")
    header = ["decode", "memory: Diffusers", "bands", "tiling", "time: Diffusers", "bands", "tiling"]
    rows = []
    for name in [arguments.model] if arguments.model else MODELS:
        rows.append(measure(name, arguments))
        print(", ".join(rows[-1]), file=sys.stderr, flush=True)  # all of them take most of an hour
    print_table([*header, "error: bands", "tiling"], rows)


if __name__ == "__main__":
    main()
