"""Input images to embeddings, through an image encoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from safelight.core.config import PipelineConfig
from safelight.core.request import Req
from safelight.core.server_args import ServerArgs
from safelight.core.stage import PipelineStage


class ImageEncodingStage(PipelineStage):
    """Embeds the input images with an image encoder, where the model has one."""

    def __init__(self, image_encoder: Any, image_processor: Any, config: PipelineConfig) -> None:
        self.image_encoder = image_encoder
        self.image_processor = image_processor
        self.config = config

    def needed_modules(self, batch: Req) -> Sequence[nn.Module]:
        """Return the image encoder, where there are images for it."""
        return (self.image_encoder,) if self.config.images_to_embed(batch) else ()

    def forward(self, batch: Req, server_args: ServerArgs) -> Req:
        """Fill `image_embeds` with the encoder's last hidden states but one, [N, S, C]."""
        images = self.config.images_to_embed(batch)
        if not images:
            return batch
        key = ("image_encoder", self.cache.images_of(batch.params))
        found = self.cache.get(*key)
        if found is None:
            pixels = self.image_processor(images=images, return_tensors="pt").pixel_values
            # A copy: what NumPy made lies anywhere, and bytes may depend on where.
            pixels = pixels.to(self.image_encoder.device, self.image_encoder.dtype, copy=True)
            dtype = server_args.component_dtype("transformer", self.config.precisions.get("transformer"))
            hidden_states = self.image_encoder(pixels, output_hidden_states=True).hidden_states
            found = self.cache.put(hidden_states[-2].to(dtype), None, *key)
        batch.image_embeds = found[0]
        return batch
