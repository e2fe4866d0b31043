"""Input images and clips into latents."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from safelight.core.calls import ModelCall
from safelight.core.config import PipelineConfig
from safelight.core.request import Req
from safelight.core.server_args import ServerArgs
from safelight.core.stage import PipelineStage, Steps
from safelight.stages.vae import INPUT, VAE, State

COMPONENT = "vae"


@dataclass
class EncodingState:
    """What is kept between two units of an encode.

    Attributes:
        vae: the VAE's own state.
        latents: of the frames so far, [1, C, ...] each.

    """

    vae: State
    latents: list[Tensor] = field(default_factory=list)


class ImageVAEEncodingStage(PipelineStage):
    """Encodes the input images with the VAE, prepared as the model takes them."""

    def __init__(self, vae: VAE, config: PipelineConfig) -> None:
        self.vae = vae
        self.config = config

    def run(self, batch: Req, server_args: ServerArgs) -> Steps:
        """Fill `image_latents`, one entry an encoding; a call for each unit of one."""
        for index in range(self.config.num_vae_inputs(batch)):
            kept = self.cache.get(COMPONENT, index, self.cache.images_of(batch.params))
            if kept is None:
                for unit in range(self._begin(batch, index, server_args)):
                    self._take(batch, (yield [self._call(batch, unit)]))
                kept = self._finish(batch, index)
            batch.image_latents.append(kept[0])
            del kept

    def _begin(self, batch: Req, index: int, server_args: ServerArgs) -> int:
        """Lay out what is encoded; return the number of units."""
        dtype = server_args.component_dtype(COMPONENT, self.config.precisions.get(COMPONENT))
        pixels = self.config.prepare_vae_input(batch, index).to(server_args.torch_device(), dtype)
        batch.stage_state = EncodingState({INPUT: pixels})
        return self.vae.num_encodes(pixels.shape)

    def _call(self, batch: Req, unit: int) -> ModelCall:
        """Return the call of a unit, which takes the VAE's state with it."""
        state, batch.stage_state.vae = batch.stage_state.vae, {}
        kwargs, key = {"state": state}, batch.key("encode", unit)
        return ModelCall(COMPONENT, kwargs, {}, None, key, {"index": unit}, "encode", batch.model)

    def _take(self, batch: Req, results: list[Any]) -> None:
        """Keep the latents of a unit, scaled as the transformer takes them."""
        mode = results[0]["mode"]
        mode = mode.to(self.config.latent_dtype or mode.dtype)
        scale, shift = self.config.get_decode_scale_and_shift(mode)
        batch.stage_state.vae = results[0]["state"]
        batch.stage_state.latents.append((mode - shift) * scale)

    def _finish(self, batch: Req, index: int) -> tuple[Tensor, Any]:
        """Return the latents of an input, which are kept for other requests."""
        parts = batch.stage_state.latents
        latents = parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
        return self.cache.put(latents, None, COMPONENT, index, self.cache.images_of(batch.params))
