"""The initial noise."""

from __future__ import annotations

import torch

from safelight.core.config import PipelineConfig
from safelight.core.request import Req
from safelight.core.server_args import ServerArgs
from safelight.core.stage import PipelineStage


class LatentPreparationStage(PipelineStage):
    """Draws the noise from the request's seed, on the CPU, so that a seed gives Diffusers' noise everywhere."""

    def __init__(self, config: PipelineConfig) -> None:
        self.config = config

    def forward(self, batch: Req, server_args: ServerArgs) -> Req:
        """Fill `generator`, `raw_latent_shape` and `latents`."""
        assert batch.params.seed is not None
        batch.generator = torch.Generator("cpu").manual_seed(batch.params.seed)
        batch.raw_latent_shape = self.config.prepare_latent_shape(batch)
        dtype = self.config.latent_dtype or batch.prompt_embeds[-1].dtype
        noise = torch.randn(batch.raw_latent_shape, generator=batch.generator, dtype=dtype)
        batch.latents = self.config.maybe_pack_latents(noise.to(server_args.torch_device()), batch)
        return batch
