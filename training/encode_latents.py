"""Draw every training scene several times and keep the latents, so that training never encodes."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from torch import Tensor

from training.shapes import Scene, draw, split_scenes
from training.train_autoencoder import load_autoencoder

BATCH_SIZE = 16


def latents_of(
    autoencoder: AutoencoderKL,
    scenes: list[Scene],
    generator: np.random.Generator,
    width: int = 128,
    height: int = 128,
) -> Tensor:
    """Means of the posterior, `[B, C, H/8, W/8]` float16, neither shifted nor scaled."""
    pictures = np.stack([np.asarray(draw(scene, generator, width, height)) for scene in scenes])
    pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.inference_mode():
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        latents: Tensor = autoencoder.encode(pixels).latent_dist.mean.half().contiguous()
    return latents


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--drawings", type=int, default=5, help="of each scene")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    autoencoder = load_autoencoder(arguments.out)
    generator = np.random.default_rng(arguments.seed)
    scenes, _ = split_scenes()
    scene_indices = np.tile(np.arange(len(scenes)), arguments.drawings)
    latents = []
    for start in range(0, len(scene_indices), BATCH_SIZE):
        batch = [scenes[index] for index in scene_indices[start : start + BATCH_SIZE]]
        latents.append(latents_of(autoencoder, batch, generator))
        if start % (100 * BATCH_SIZE) == 0:
            print(f"{start} of {len(scene_indices)}", flush=True)
    tensors = {"latents": torch.cat(latents), "scene_indices": torch.from_numpy(scene_indices)}
    save_file(tensors, arguments.out / "latents.safetensors")


if __name__ == "__main__":
    main()
