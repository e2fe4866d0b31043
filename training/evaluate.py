"""Generate pictures with Diffusers' FluxPipeline and let the judge look at them."""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from diffusers import FluxPipeline
from PIL import Image

from training.judge import judge
from training.shapes import Scene, prompt_for, split_scenes, varied_prompt_for

BATCH_SIZE = 20
GAP = 4


def generate(
    pipeline: FluxPipeline, prompts: list[str], first_seed: int, sampling: dict[str, int]
) -> list[Image.Image]:
    """One picture a prompt; picture `i` has the seed `first_seed + i`."""
    images: list[Image.Image] = []
    for start in range(0, len(prompts), BATCH_SIZE):
        batch = prompts[start : start + BATCH_SIZE]
        generators = [torch.Generator().manual_seed(first_seed + start + index) for index in range(len(batch))]
        images += pipeline(prompt=batch, generator=generators, **sampling).images
    return images


def grid(images: list[Image.Image], num_columns: int) -> Image.Image:
    """All pictures in rows, at their own size."""
    width, height = images[0].width + GAP, images[0].height + GAP
    num_rows = -(-len(images) // num_columns)
    sheet = Image.new("RGB", (num_columns * width, num_rows * height), (128, 128, 128))
    for index, image in enumerate(images):
        sheet.paste(image, (index % num_columns * width, index // num_columns * height))
    return sheet


def report(title: str, scenes: list[Scene], images: list[Image.Image]) -> None:
    """Print how many pictures the judge accepts, and what was wrong with the others."""
    mistakes = [judge(image).mistakes(scene) for scene, image in zip(scenes, images, strict=True)]
    print(f"{title}: {sum(not each for each in mistakes)} of {len(scenes)} right", flush=True)
    print("  ", dict(Counter(name for each in mistakes for name in each)))
    for index, (scene, each) in enumerate(zip(scenes, mistakes, strict=True)):
        if each:
            print(f"   {index}: {prompt_for(scene)}: {', '.join(each)}")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--grid", type=Path, required=True, help="PNG to write")
    parser.add_argument("--count", type=int, default=100, help="of each half of the split")
    parser.add_argument("--steps", type=int, help="instead of the model's default")
    parser.add_argument("--varied", action="store_true", help="prompts as people may type them")
    parser.add_argument("--seed", type=int, default=1000)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    pipeline = FluxPipeline.from_pretrained(arguments.model, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    sampling = json.loads((arguments.model / "generation_config.json").read_text())
    if arguments.steps:
        sampling["num_inference_steps"] = arguments.steps
    generator = np.random.default_rng(arguments.seed)
    images = []
    for title, pool in zip(("in training", "held out"), split_scenes(), strict=True):
        indices = generator.choice(len(pool), arguments.count, replace=False)
        scenes = [pool[index] for index in indices]
        prompts = [varied_prompt_for(scene, generator) if arguments.varied else prompt_for(scene) for scene in scenes]
        start = time.monotonic()
        drawn = generate(pipeline, prompts, arguments.seed, sampling)
        print(f"{title}: {(time.monotonic() - start) / len(drawn):.2f} s a picture, in batches")
        report(title, scenes, drawn)
        images += drawn
    grid(images, num_columns=20).save(arguments.grid)


if __name__ == "__main__":
    main()
