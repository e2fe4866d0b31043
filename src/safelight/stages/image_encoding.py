"""Input images to embeddings, through an image encoder."""

from __future__ import annotations

from typing import Any

from PIL import Image

from safelight.core.calls import ModelCall
from safelight.core.config import COND, PipelineConfig
from safelight.core.request import Req
from safelight.core.server_args import ServerArgs
from safelight.core.stage import PipelineStage, Steps

COMPONENT = "image_encoder"


class ImageEncodingStage(PipelineStage):
    """Embeds the input images with an image encoder, where the model has one."""

    def __init__(self, image_processor: Any, config: PipelineConfig) -> None:
        self.image_processor = image_processor
        self.config = config

    def run(self, batch: Req, server_args: ServerArgs) -> Steps:
        """Fill `image_embeds` with the encoder's last hidden states but one, [N, S, C]."""
        images = self.config.images_to_embed(batch)
        if not images:
            return
        key = (COMPONENT, self.cache.images_of(batch.params))
        found = self.cache.get(*key)
        if found is None:
            (made,) = yield [self._call(images, batch, server_args)]
            dtype = server_args.component_dtype("transformer", self.config.precisions.get("transformer"))
            found = self.cache.put(made.to(dtype), None, *key)
        batch.image_embeds = found[0]

    def _call(self, images: list[Image.Image], batch: Req, server_args: ServerArgs) -> ModelCall:
        """Return the call of the image encoder."""
        pixels = self.image_processor(images=images, return_tensors="pt").pixel_values
        # A copy: what NumPy made lies anywhere, and bytes may depend on where.
        kwargs = {"pixel_values": pixels.to(server_args.torch_device(), copy=True)}
        return ModelCall(COMPONENT, kwargs, {}, None, batch.key(COND), method="encode", model=batch.model)
