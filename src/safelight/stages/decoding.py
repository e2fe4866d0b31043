"""Latents to pixels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from safelight.core.config import PipelineConfig
from safelight.core.request import Req
from safelight.core.server_args import ServerArgs
from safelight.core.stage import PipelineStage
from safelight.errors import NonFiniteOutputError


class DecodingStage(PipelineStage):
    """Decodes the latents with the VAE. NaN and infinity end the request: they never become a picture."""

    def __init__(self, vae: Any, config: PipelineConfig) -> None:
        self.vae = vae
        self.config = config

    def needed_modules(self, batch: Req) -> Sequence[nn.Module]:
        """Return the VAE, unless latents are asked for."""
        return () if batch.params.output_type == "latent" else (self.vae,)

    def forward(self, batch: Req, server_args: ServerArgs) -> Req:
        """Fill `outputs`: pictures [H, W, C] or videos [T, H, W, C], uint8 for `pil` and float32 in [0, 1] otherwise.

        For `latent` they are the latents, as the loop left them.
        """
        assert batch.latents is not None
        parts = batch.latents if isinstance(batch.latents, tuple) else (batch.latents,)
        for part in parts:
            check_finite(part, "latents")
        if batch.params.output_type == "latent":
            batch.outputs.extend(part[0].cpu() for part in parts)
            return batch
        latents = self.config.post_denoising_loop(batch.latents, batch).to(self.vae.device, self.vae.dtype)
        scale, shift = self.config.get_decode_scale_and_shift(latents)
        pixels = self.vae.decode(latents / scale + shift, return_dict=False)[0]
        check_finite(pixels, "pixels")
        if pixels.ndim == 5 and not self.config.task.makes_video:
            pixels = pixels.squeeze(2)  # a picture from a VAE for videos
        batch.outputs.extend(to_media(picture, batch.params.output_type) for picture in pixels)
        return batch


def check_finite(tensor: Tensor, what: str) -> None:
    """Raise `NonFiniteOutputError` if the tensor holds NaN or infinity."""
    if not torch.isfinite(tensor).all():
        raise NonFiniteOutputError(f"the model made {what} that are not finite; no picture is made of them")


def to_media(pixels: Tensor, output_type: str | None) -> Tensor:
    """Return decoded pixels [C, ..., H, W] in [-1, 1] as [..., H, W, C] on the CPU, rounded to uint8 for `pil`.

    They are rounded where they are: a quarter of the bytes leaves the device.
    """
    unit = (pixels * 0.5 + 0.5).clamp(0, 1).movedim(0, -1).float()
    return (unit * 255).round().to(torch.uint8).cpu() if output_type == "pil" else unit.cpu()
