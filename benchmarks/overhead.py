"""What loop and stages cost around the models, a step and a call, beside Diffusers on the same tiny checkpoint.

Each model's own calls are timed inside every run and taken off; what is left, at two numbers of steps, is a line: its
slope is the overhead of a step, the rest that of a call (tokenizers, schedule, noise, post-processing).
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import begin, print_table
from safelight.testing.recipes import shake
from tests.recipes.flux import components

FEW_STEPS, MANY_STEPS = 4, 24
TARGET = 1.0
REQUEST: dict[str, Any] = {"prompt": "a photo of a cat", "height": 32, "width": 32, "max_sequence_length": 16}


@dataclass
class Side:
    """One engine on the checkpoint.

    Attributes:
        generate: makes a picture in the given number of steps.
        seconds: spent inside its models so far.
        samples: for each number of steps, (overhead, seconds in the transformer) of each run.

    """

    generate: Callable[[int], object]
    seconds: dict[str, float] = field(default_factory=dict)
    samples: dict[int, list[tuple[float, float]]] = field(default_factory=dict)

    def watch(self, module: Any, method: str, name: str) -> None:
        """Charge the time of a module's method to `name`."""
        inner = getattr(module, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            begun = time.process_time()
            try:
                return inner(*args, **kwargs)
            finally:
                self.seconds[name] = self.seconds.get(name, 0.0) + time.process_time() - begun

        setattr(module, method, timed)

    def run(self, num_steps: int) -> None:
        """Make one picture, and keep what it cost."""
        self.seconds.clear()
        begun = time.process_time()
        self.generate(num_steps)
        overhead = time.process_time() - begun - sum(self.seconds.values())
        self.samples.setdefault(num_steps, []).append((overhead, self.seconds["transformer"]))

    def per_step(self) -> float:
        """Return the overhead of a step, in seconds."""
        return (self._overhead(MANY_STEPS) - self._overhead(FEW_STEPS)) / (MANY_STEPS - FEW_STEPS)

    def per_call(self) -> float:
        """Return the overhead of a call without its steps, in seconds."""
        return self._overhead(FEW_STEPS) - FEW_STEPS * self.per_step()

    def forward(self) -> float:
        """Return the seconds of one transformer forward."""
        return statistics.median(seconds for _, seconds in self.samples[MANY_STEPS]) / MANY_STEPS

    def _overhead(self, num_steps: int) -> float:
        return statistics.median(overhead for overhead, _ in self.samples[num_steps])


def build(folder: Path) -> None:
    """Write a FLUX.1 checkpoint with a transformer 32 wide."""
    from diffusers import FluxPipeline, FluxTransformer2DModel

    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=40,
        pooled_projection_dim=32,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )
    parts = {**components(folder, "dev"), "transformer": shake(transformer, 4)}
    FluxPipeline(**parts).save_pretrained(folder)


def diffusers_side(folder: Path) -> Side:
    """Return Diffusers' pipeline, without its progress bar."""
    from diffusers import FluxPipeline

    pipeline = FluxPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)

    def generate(num_steps: int) -> object:
        generator = torch.Generator().manual_seed(0)
        return pipeline(**REQUEST, num_inference_steps=num_steps, generator=generator).images[0]

    side = Side(generate)
    watch_models(side, lambda name: getattr(pipeline, name))
    return side


def our_side(folder: Path) -> Side:
    """Return Safelight's pipeline."""
    from safelight.core.server_args import ServerArgs
    from safelight.generator import DiffusionGenerator
    from safelight.loading.loader import load_pipeline

    pipeline = load_pipeline(ServerArgs(model=str(folder), device="cpu", dtype="float32"))
    generator = DiffusionGenerator(pipeline)

    def generate(num_steps: int) -> object:
        return generator.generate(**REQUEST, num_inference_steps=num_steps, seed=0).images[0]

    side = Side(generate)
    watch_models(side, pipeline.get_module)
    return side


def watch_models(side: Side, component: Callable[[str], Any]) -> None:
    """Take the models' own time out of the side's overhead."""
    for name in ("text_encoder", "text_encoder_2", "transformer"):
        side.watch(component(name), "forward", name)
    side.watch(component("vae"), "decode", "vae")


def main() -> None:
    """Measure both sides, A B B A, at both numbers of steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60, help="rounds of A B B A")
    arguments = begin(parser)
    with tempfile.TemporaryDirectory() as folder:
        build(Path(folder))
        theirs, ours = diffusers_side(Path(folder)), our_side(Path(folder))
        for side in (theirs, ours):
            side.run(FEW_STEPS)
            side.samples.clear()
        for _ in range(5 if arguments.quick else arguments.rounds):
            for side in (theirs, ours, ours, theirs):
                side.run(FEW_STEPS)
                side.run(MANY_STEPS)
    print(f"FLUX.1, 1 + 1 blocks, 32 wide; at most {TARGET:.1f} is wanted")
    values = {
        "overhead of a step, µs": (theirs.per_step() * 1e6, ours.per_step() * 1e6),
        "overhead of a call, µs": (theirs.per_call() * 1e6, ours.per_call() * 1e6),
        "one transformer forward, µs": (theirs.forward() * 1e6, ours.forward() * 1e6),
    }
    rows = [[name, f"{their:.0f}", f"{our:.0f}", f"{our / their:.2f}"] for name, (their, our) in values.items()]
    print_table(["", "Diffusers", "Safelight", "ratio"], rows)


if __name__ == "__main__":
    main()
