"""Input images into latents."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from safelight.core.config import PipelineConfig
from safelight.core.request import Req
from safelight.core.server_args import ServerArgs
from safelight.core.stage import PipelineStage, Steps


class ImageVAEEncodingStage(PipelineStage):
    """Encodes each input image with the VAE, at the size that the model wants."""

    def __init__(self, vae: Any, config: PipelineConfig) -> None:
        self.vae = vae
        self.config = config

    def run(self, batch: Req, server_args: ServerArgs) -> Steps:
        """Fill `image_latents`, with a boundary between two images."""
        for index, image in enumerate(batch.params.image or ()):
            if index:
                yield []
            batch.image_latents.append(self._encode(image, *self.config.input_image_size(batch, index)))
        yield from ()

    def _encode(self, image: Image.Image, height: int, width: int) -> Tensor:
        """Return the mode of the posterior, [1, C, H, W], scaled as the transformer takes it."""
        pixels = image_to_tensor(image.resize((width, height), Image.Resampling.LANCZOS))
        posterior = self.vae.encode(pixels.to(self.vae.device, self.vae.dtype)).latent_dist
        scale, shift = self.config.get_decode_scale_and_shift()
        latents: Tensor = (posterior.mode() - shift) * scale
        return latents


def image_to_tensor(image: Image.Image) -> Tensor:
    """Return an RGB picture as float32 [1, 3, H, W] in [-1, 1]."""
    pixels = torch.from_numpy(np.asarray(image, dtype=np.float32) / 255.0)  # H W C
    return 2.0 * pixels.permute(2, 0, 1)[None] - 1.0
