"""Train the autoencoder: pictures of 3x128x128 to latents of 8x16x16 and back.

First both halves learn on crops of 64x64 around an edge, a quarter of the cost of a picture. Then
the encoder is frozen, so that latents can be kept and the transformer can begin, and the decoder
alone goes on with whole pictures, because group normalisation takes its statistics from the whole
picture, and with noisier latents, because a denoiser's are never exact.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from training.loop import Trainee, learning_rate_factor, steps_until_stopped
from training.shapes import PALETTE, SHAPES, mask_at

PICTURE_SIZE = 128
CROP_SIZE = 64
NUM_MASKS = 6000
KL_WEIGHT = 1e-4
# Standard deviation, at most, relative to that of the latents.
DECODER_NOISE = 0.03
# Of every channel once frozen. Not 1 and 0, so that an engine that forgets either factor shows it.
LATENT_STD = 2.0
LATENT_MEAN = 0.25
EDGE_WEIGHT = 0.5


def make_autoencoder() -> AutoencoderKL:
    """The architecture, with fresh weights."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 64),
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=8,
        sample_size=PICTURE_SIZE,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
        scaling_factor=1 / LATENT_STD,
        shift_factor=LATENT_MEAN,
    )


def freeze(seed: int, out: Path) -> None:
    """Give the averaged encoder latents of equal mean and spread in every channel, for good.

    Equal channels vanish in the noise together, and one scaling_factor and one shift_factor serve
    all. The decoder undoes it, save at the borders, which it learns when it is trained on.
    """
    autoencoder = make_autoencoder()
    modules = nn.ModuleDict({"vae": autoencoder})
    modules.load_state_dict(torch.load(out / "autoencoder.pt", weights_only=True)["average"])
    pictures = Pictures(np.random.default_rng(seed))
    with torch.no_grad():
        parts = [autoencoder.encode(pictures.batch(16, PICTURE_SIZE)).latent_dist.mean for _ in range(32)]
        latents = torch.cat(parts)
        mean, std = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))  # [C]
        gain = LATENT_STD / std
        offset = LATENT_MEAN - gain * mean
        last, first = autoencoder.encoder.conv_out, autoencoder.decoder.conv_in
        first.bias -= first.weight.sum(dim=(2, 3)) @ (offset / gain)
        first.weight /= gain[:, None, None]
        log_variance_offset = 2 * gain.log()
        last.weight *= torch.cat([gain, torch.ones_like(gain)])[:, None, None, None]
        last.bias.copy_(last.bias * torch.cat([gain, torch.ones_like(gain)]) + torch.cat([offset, log_variance_offset]))
    torch.save(autoencoder.state_dict(), out / "frozen.pt")


def load_autoencoder(out: Path) -> AutoencoderKL:
    """The frozen encoder, and the decoder as far as it is trained, for inference."""
    autoencoder = make_autoencoder()
    autoencoder.load_state_dict(torch.load(out / "frozen.pt", weights_only=True))
    if (out / "decoder.pt").exists():
        decoder = nn.ModuleDict({"decoder": autoencoder.decoder})
        decoder.load_state_dict(torch.load(out / "decoder.pt", weights_only=True)["average"])
    return autoencoder.eval().to(memory_format=torch.channels_last)


class Pictures:
    """Random shapes anywhere, not only at the five positions, so that other sizes decode too."""

    def __init__(self, generator: np.random.Generator) -> None:
        self.generator = generator
        # More small ones than large: their corners are what is lost first.
        self.centres = generator.uniform(0.22, 0.78, (NUM_MASKS, 2)) * PICTURE_SIZE
        radii = generator.triangular(0.095, 0.11, 0.24, NUM_MASKS) * PICTURE_SIZE
        self.masks = np.stack(
            [
                mask_at(SHAPES[index % len(SHAPES)], x, y, radius, PICTURE_SIZE, PICTURE_SIZE)
                for index, ((x, y), radius) in enumerate(zip(self.centres, radii, strict=True))
            ]
        )
        self.palette = torch.tensor(list(PALETTE.values()), dtype=torch.float32) / 127.5 - 1

    def batch(self, batch_size: int, crop_size: int) -> Tensor:
        """Pictures `[B, 3, crop_size, crop_size]` in -1 to 1, cropped around the shape."""
        indices = self.generator.integers(NUM_MASKS, size=batch_size)
        wander = self.generator.uniform(-24, 24, (batch_size, 2))
        corners = (self.centres[indices] + wander - crop_size / 2).round().astype(int)
        corners = corners.clip(0, PICTURE_SIZE - crop_size)
        masks = np.stack(
            [
                self.masks[index, y : y + crop_size, x : x + crop_size]
                for index, (x, y) in zip(indices, corners, strict=True)
            ]
        )
        coverage = torch.from_numpy(masks).float()[:, None] / 255
        pairs = np.stack([self.generator.permutation(len(self.palette))[:2] for _ in range(batch_size)])
        background, colour = self.palette[pairs].unbind(1)  # each [B, 3]
        background, colour = background[:, :, None, None], colour[:, :, None, None]
        return background + coverage * (colour - background)


def absolute_loss(error: Tensor) -> Tensor:
    """L1, and L1 of the differences between neighbours, which makes edges crisp."""
    edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    return error.abs().mean() + EDGE_WEIGHT * edges


def train(num_steps: int, learning_rate: float, seed: int, out: Path) -> None:
    """Train both halves, resuming from `out`, and log the loss."""
    autoencoder = make_autoencoder().to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(autoencoder.parameters(), lr=learning_rate, betas=(0.9, 0.99))
    trainee = Trainee(nn.ModuleDict({"vae": autoencoder}), [optimizer], average_decay=0.995)
    path = out / "autoencoder.pt"
    trainee.resume(path)
    pictures = Pictures(np.random.default_rng((seed, trainee.step)))
    start, losses = time.monotonic(), []
    for step in steps_until_stopped(trainee, num_steps, path):
        batch = pictures.batch(8, CROP_SIZE).contiguous(memory_format=torch.channels_last)
        posterior = autoencoder.encode(batch).latent_dist
        decoded = autoencoder.decode(posterior.sample(), return_dict=False)[0]
        error = decoded - batch
        loss = absolute_loss(error) + error.square().mean()
        divergence = posterior.kl().mean() / posterior.mean[0].numel()
        torch.autograd.backward(loss + KL_WEIGHT * divergence)
        norm = trainee.advance(learning_rate_factor(step, 100, num_steps), 1.0)
        losses.append(loss.item())
        if step % 50 == 0:
            spread, noise = posterior.mean.std().item(), posterior.std.mean().item()
            print(
                f"{step} loss {np.mean(losses[-50:]):.4f} gradient {norm:.2f} latents {spread:.2f}"
                f" noise {noise:.2f} {time.monotonic() - start:.0f} s",
                flush=True,
            )


def train_decoder(num_steps: int, learning_rate: float, seed: int, out: Path) -> None:
    """Train the decoder on, behind the frozen encoder of `out`; the average is the result."""
    autoencoder = load_autoencoder(out)
    decoder = autoencoder.decoder
    optimizer = torch.optim.Adam(decoder.parameters(), lr=learning_rate, betas=(0.9, 0.99))
    trainee = Trainee(nn.ModuleDict({"decoder": decoder}), [optimizer], average_decay=0.995)
    path = out / "decoder.pt"
    trainee.resume(path)
    torch.manual_seed(seed + trainee.step)
    pictures = Pictures(np.random.default_rng((seed, trainee.step)))
    start, losses = time.monotonic(), []
    for step in steps_until_stopped(trainee, num_steps, path):
        batch = pictures.batch(4, PICTURE_SIZE).contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            latents = autoencoder.encode(batch).latent_dist.mean
        spread = DECODER_NOISE * LATENT_STD * torch.rand(len(latents), 1, 1, 1)
        decoded = decoder(latents + spread * torch.randn_like(latents))
        # Edges between similar colours shall be as crisp as others. No squared error here: where an
        # edge may lie here or there, it would ask for a blend.
        contrast = (batch.amax(dim=(2, 3)) - batch.amin(dim=(2, 3))).mean(dim=1)
        loss = absolute_loss((decoded - batch) / contrast[:, None, None, None])
        torch.autograd.backward(loss)
        norm = trainee.advance(learning_rate_factor(step, 50, num_steps), 1.0)
        losses.append(loss.item())
        if step % 50 == 0:
            print(
                f"{step} loss {np.mean(losses[-50:]):.4f} gradient {norm:.2f} {time.monotonic() - start:.0f} s",
                flush=True,
            )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("phase", choices=("both", "freeze", "decoder"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.phase == "freeze":
        freeze(arguments.seed, arguments.out)
        return
    phase = train if arguments.phase == "both" else train_decoder
    phase(arguments.steps, arguments.learning_rate, arguments.seed, arguments.out)


if __name__ == "__main__":
    main()
