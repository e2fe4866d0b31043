"""Train the transformer and both text encoders together by flow matching, from nothing.

The network predicts noise - latents at sigma, as FluxPipeline samples it (Liu et al. 2022,
Lipman et al. 2022, Esser et al. 2024).
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from training.components import (
    SHIFT,
    image_ids,
    make_clip,
    make_t5,
    make_transformer,
    pack_latents,
    token_ids,
)
from training.loop import Trainee, learning_rate_factor, steps_until_stopped
from training.muon import Muon
from training.shapes import (
    DEFAULT_PROMPT_FRACTION,
    POSITION_JITTER,
    POSITIONS,
    RADII,
    SIZES,
    split_scenes,
    varied_prompt_for,
)
from training.tokenizers import T5_MAX_LENGTH, train_clip_tokenizer, train_t5_tokenizer
from training.train_autoencoder import LATENT_MEAN, LATENT_STD

# Without the prompt, so that classifier-free guidance has its other branch (Ho & Salimans 2022).
EMPTY_PROMPT_FRACTION = 0.1
NUM_WARMUP_STEPS = 100
# Patches along each side of a picture of 128x128.
GRID = 8
# Share of the loss that the patches hold where the shape may be.
SHAPE_WEIGHT = 0.75
# How often drawings of a kind are taken, against once for the others: small points are what is learnt last.
FREQUENCIES = {("large", "star"): 1.5, ("small", "star"): 7.0}


class Examples:
    """Latents with prompts, in random order."""

    def __init__(self, path: Path, tokenizer_seed: int) -> None:
        tensors = load_file(path)
        self.latents = tensors["latents"]
        self.scene_indices = tensors["scene_indices"].numpy()
        self.scenes, _ = split_scenes()
        scenes = [self.scenes[index] for index in self.scene_indices]
        frequencies = np.array([FREQUENCIES.get((scene.size, scene.shape), 1.0) for scene in scenes])
        self.probabilities = frequencies / frequencies.sum()
        self.weights = {(size, position): patch_weights(size, position) for size in SIZES for position in POSITIONS}
        self.clip_tokenizer = train_clip_tokenizer(tokenizer_seed)
        self.t5_tokenizer = train_t5_tokenizer(tokenizer_seed)

    def batch(
        self, batch_size: int, default_fraction: float, generator: np.random.Generator
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Packed latents `[B, 64, 4C]`, weights `[B, 64]`, CLIP's ids and T5's ids `[B, 32]`."""
        indices = generator.choice(len(self.latents), size=batch_size, p=self.probabilities)
        scenes = [self.scenes[index] for index in self.scene_indices[indices]]
        is_empty = generator.random(batch_size) < EMPTY_PROMPT_FRACTION
        prompts = [
            "" if empty else varied_prompt_for(scene, generator, default_fraction)
            for scene, empty in zip(scenes, is_empty, strict=True)
        ]
        weights = torch.stack([self.weights[scene.size, scene.position] for scene in scenes])
        weights[torch.from_numpy(is_empty)] = 1
        latents = (self.latents[torch.from_numpy(indices)].float() - LATENT_MEAN) / LATENT_STD
        return pack_latents(latents), weights, *token_ids(prompts, self.clip_tokenizer, self.t5_tokenizer)


def patch_weights(size: str, position: str) -> Tensor:
    """Weights `[64]` of the patches' errors, 1 on average, higher where the shape may be.

    Unweighted, a small shape is a fortieth of the loss. They depend on the prompt alone, never on the
    drawing, so that the best prediction remains the mean of the drawings.
    """
    reach = 1.25 * RADII[size] + POSITION_JITTER + 0.5 / GRID
    middles = (torch.arange(GRID) + 0.5) / GRID
    x, y = POSITIONS[position]
    inside = ((middles - y).abs() < reach)[:, None] & ((middles - x).abs() < reach)[None]
    share = inside.float().mean()
    return torch.where(inside, SHAPE_WEIGHT / share, (1 - SHAPE_WEIGHT) / (1 - share)).flatten()


def make_modules(examples: Examples) -> nn.ModuleDict:
    """Everything that is trained here, with fresh weights."""
    return nn.ModuleDict(
        {
            "transformer": make_transformer(),
            "text_encoder": make_clip(examples.clip_tokenizer),
            "text_encoder_2": make_t5(examples.t5_tokenizer),
        }
    )


def make_optimizers(
    modules: nn.ModuleDict, learning_rate: float, matrix_learning_rate: float
) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, Adam for all else (Jordan et al. 2024)."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in modules.named_parameters():
        inside = "blocks." in name or "layers." in name or "block." in name
        is_modulation = ".norm" in name or "relative_attention_bias" in name
        is_matrix = inside and parameter.ndim == 2 and not is_modulation
        (matrices if is_matrix else others).append(parameter)
    return [
        Muon(matrices, learning_rate=matrix_learning_rate),
        torch.optim.Adam(others, lr=learning_rate, betas=(0.9, 0.98)),
    ]


def flow_loss(modules: nn.ModuleDict, latents: Tensor, weights: Tensor, clip_ids: Tensor, t5_ids: Tensor) -> Tensor:
    """Weighted squared error of the velocity, for each example at a sigma of its own, `[B]`."""
    batch_size = len(latents)
    # One sigma in each of B equal parts of the schedule: less noise in the gradient.
    uniform = (torch.arange(batch_size) + torch.rand(batch_size)) / batch_size
    sigmas = SHIFT * uniform / (1 + (SHIFT - 1) * uniform)
    noise = torch.randn_like(latents)
    noisy = latents + sigmas[:, None, None] * (noise - latents)
    predicted = modules["transformer"](
        hidden_states=noisy,
        encoder_hidden_states=modules["text_encoder_2"](t5_ids).last_hidden_state,
        pooled_projections=modules["text_encoder"](clip_ids).pooler_output,
        timestep=sigmas,
        img_ids=image_ids(2 * GRID, 2 * GRID),
        txt_ids=torch.zeros(T5_MAX_LENGTH, 3),
        return_dict=False,
    )[0]
    errors: Tensor = (predicted - (noise - latents)).square().mean(dim=2)
    return (weights * errors).mean(dim=1)


def train(arguments: argparse.Namespace) -> None:
    """Train, resuming from `arguments.out`, and log the loss."""
    torch.manual_seed(arguments.seed)
    examples = Examples(arguments.out / "latents.safetensors", tokenizer_seed=0)
    modules = make_modules(examples)
    optimizers = make_optimizers(modules, arguments.learning_rate, arguments.matrix_learning_rate)
    trainee = Trainee(modules, optimizers, average_decay=0.998)
    path = arguments.out / f"{arguments.name}.pt"
    trainee.resume(path)
    generator = np.random.default_rng((arguments.seed, trainee.step))
    torch.manual_seed(arguments.seed + trainee.step)
    start, losses = time.monotonic(), []
    for step in steps_until_stopped(trainee, arguments.steps, path):
        fraction = 1.0 if step < arguments.default_prompts_until else DEFAULT_PROMPT_FRACTION
        loss = flow_loss(modules, *examples.batch(arguments.batch_size, fraction, generator))
        torch.autograd.backward(loss.mean())
        norm = trainee.advance(learning_rate_factor(step, NUM_WARMUP_STEPS, arguments.steps), 1.0)
        losses.append(loss.detach())
        if step % 50 == 0:
            recent = torch.stack(losses[-50:]).mean(0)
            by_noise = " ".join(f"{part.mean():.3f}" for part in recent.chunk(4))
            print(
                f"{step} loss {recent.mean():.4f} (low to high noise: {by_noise})"
                f" gradient {norm:.2f} {time.monotonic() - start:.0f} s",
                flush=True,
            )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--name", default="transformer", help="of the checkpoint")
    parser.add_argument("--steps", type=int, default=3400)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=2.5e-3)
    parser.add_argument("--matrix-learning-rate", type=float, default=0.025)
    parser.add_argument("--default-prompts-until", type=int, default=1500, help="step from which prompts vary")
    parser.add_argument("--seed", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    train(arguments)


if __name__ == "__main__":
    main()
