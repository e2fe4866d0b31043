"""Input images into latents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from safelight.core.config import PipelineConfig
from safelight.core.request import Req
from safelight.core.server_args import ServerArgs
from safelight.core.stage import PipelineStage, Steps


class ImageVAEEncodingStage(PipelineStage):
    """Encodes the input images with the VAE, prepared as the model takes them."""

    def __init__(self, vae: Any, config: PipelineConfig) -> None:
        self.vae = vae
        self.config = config

    def needed_modules(self, batch: Req) -> Sequence[nn.Module]:
        """Return the VAE, while an input image is still to be encoded."""
        encoding = bool(batch.feature_cache) or len(batch.image_latents) < self.config.num_vae_inputs(batch)
        return (self.vae,) if encoding else ()

    def run(self, batch: Req, server_args: ServerArgs) -> Steps:
        """Fill `image_latents`, with a boundary between two encodings."""
        for index in range(self.config.num_vae_inputs(batch)):
            if index:
                yield []
            if not self.take_cached(batch, index):
                batch.image_latents.append(self._encode(batch, index))
                self.keep(batch, index)
        yield from ()

    def take_cached(self, batch: Req, index: int) -> bool:
        """Append the latents of an input that was encoded before; False where it was not."""
        found = self.cache.get("vae", index, self.cache.images_of(batch.params))
        if found is not None:
            batch.image_latents.append(found[0])
        return found is not None

    def keep(self, batch: Req, index: int) -> None:
        """Keep the latents of an input for other requests."""
        latents = batch.image_latents[index]
        batch.image_latents[index], _ = self.cache.put(latents, None, "vae", index, self.cache.images_of(batch.params))

    def _encode(self, batch: Req, index: int) -> Tensor:
        """Return the mode of the posterior, [1, C, ...], scaled as the transformer takes it."""
        pixels = self.config.prepare_vae_input(batch, index)
        mode = self.vae.encode(pixels.to(self.vae.device, self.vae.dtype)).latent_dist.mode()
        scale, shift = self.config.get_decode_scale_and_shift(mode)
        latents: Tensor = (mode - shift) * scale
        return latents
