"""What comes before the loop of `ToyVariationPipeline`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from safelight.core.request import Req
from safelight.core.server_args import ServerArgs
from safelight.core.stage import PipelineStage, Steps
from safelight.stages.conditioning import ConditioningStage
from safelight.stages.image_vae_encoding import ImageVAEEncodingStage
from safelight.stages.text_encoding import TextEncodingStage
from safelight.stages.timestep_preparation import TimestepPreparationStage
from safelight.stages.vae import VAE
from toy_models.config import ToyVariationPipelineConfig
from toy_models.params import ToyVariationSamplingParams


class ToyBeforeDenoisingStage(PipelineStage):
    """Prepares text, image, a schedule that starts late, and the image noised to its first level.

    What is usual is left to the standard stages; the stage itself keeps nothing of a request.

    Args:
        tokenizer: CLIP's.
        vae: encodes the image.
        scheduler: the solver, copied for each request.
        config: the model's conventions.

    """

    def __init__(self, tokenizer: Any, vae: VAE, scheduler: Any, config: ToyVariationPipelineConfig) -> None:
        self.config = config
        self.text_encoding = TextEncodingStage([tokenizer], None, config)
        self.image_encoding = ImageVAEEncodingStage(vae, config)
        self.timestep_preparation = TimestepPreparationStage(scheduler, config)
        self.conditioning = ConditioningStage(config)

    def parts(self) -> Sequence[PipelineStage]:
        """Return the stages inside: what is given to all stages, such as the conditioning cache, reaches them here."""
        return (self.text_encoding, self.image_encoding, self.timestep_preparation, self.conditioning)

    def run(self, batch: Req, server_args: ServerArgs) -> Steps:
        """Fill all that the loop needs, with a boundary before each piece of work."""
        yield from self.text_encoding.run(batch, server_args)
        yield []
        yield from self.image_encoding.run(batch, server_args)
        yield []
        self.timestep_preparation.forward(batch, server_args)
        self.start_late(batch)
        self.prepare_latents(batch)
        self.conditioning.forward(batch, server_args)

    def start_late(self, batch: Req) -> None:
        """Leave out the first steps, so that `strength` of them are done, and one at least."""
        params = batch.params
        assert isinstance(params, ToyVariationSamplingParams) and params.strength is not None
        assert batch.timesteps is not None
        skipped = batch.num_inference_steps - max(1, round(params.strength * batch.num_inference_steps))
        batch.scheduler.set_begin_index(skipped)
        batch.timesteps = batch.timesteps[skipped:].clone()  # no view of another tensor of the request
        batch.sigmas = batch.sigmas[skipped:]
        batch.num_inference_steps -= skipped

    def prepare_latents(self, batch: Req) -> None:
        """Mix the image's latents with the seed's noise, as flow matching does at the first noise level."""
        assert batch.params.seed is not None
        (image,) = (latents.to(batch.prompt_embeds[0].dtype) for latents in batch.image_latents)  # the VAE has its own
        batch.generator = torch.Generator("cpu").manual_seed(batch.params.seed)
        batch.raw_latent_shape = tuple(image.shape)
        noise = torch.randn(image.shape, generator=batch.generator, dtype=image.dtype).to(image.device)
        mixed: Tensor = torch.lerp(image, noise, batch.sigmas[0])
        batch.latents = self.config.maybe_pack_latents(mixed, batch)
