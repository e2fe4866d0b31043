"""What comes before the loop of the layered pipeline."""

from __future__ import annotations

import dataclasses
from typing import Any

from safelight.core.request import Req
from safelight.core.server_args import ServerArgs
from safelight.core.stage import PipelineStage, Steps
from safelight.families.qwen_image.config import QwenImageLayeredPipelineConfig, layered_params_of
from safelight.families.qwen_image.params import needs_caption
from safelight.families.qwen_image.prompts import CAPTION_PROMPT_CN, CAPTION_PROMPT_EN
from safelight.stages.conditioning import ConditioningStage
from safelight.stages.image_vae_encoding import ImageVAEEncodingStage
from safelight.stages.latent_preparation import LatentPreparationStage
from safelight.stages.text_encoding import TextEncodingStage
from safelight.stages.timestep_preparation import TimestepPreparationStage

MAX_CAPTION_TOKENS = 512


class QwenImageLayeredBeforeDenoisingStage(PipelineStage):
    """Writes a caption where there is no prompt, then prepares text, input image, schedule and noise.

    Args:
        text_encoder: with its head, which writes the caption.
        tokenizer: the text encoder's.
        processor: of images for the text encoder.
        vae: encodes the input image.
        scheduler: the solver, copied for each request.
        config: the model's conventions.

    """

    def __init__(
        self,
        *,
        text_encoder: Any,
        tokenizer: Any,
        processor: Any,
        vae: Any,
        scheduler: Any,
        config: QwenImageLayeredPipelineConfig,
    ) -> None:
        self.text_encoder = text_encoder
        self.tokenizer = tokenizer
        self.processor = processor
        self.config = config
        self.preparations: tuple[PipelineStage, ...] = (
            TextEncodingStage([text_encoder.model], [tokenizer], processor, config),
            ImageVAEEncodingStage(vae, config),
            TimestepPreparationStage(scheduler, config),
            LatentPreparationStage(config),
            ConditioningStage(config),
        )

    def run(self, batch: Req, server_args: ServerArgs) -> Steps:
        """Fill all that the loop needs, with a boundary before each piece of work."""
        if needs_caption(batch.params.prompts()[0]):
            batch.params = dataclasses.replace(batch.params, prompt=self.caption(batch))
        for stage in self.preparations:
            yield []
            yield from stage.run(batch, server_args)

    def caption(self, batch: Req) -> str:
        """Return what the text encoder writes about the input image, greedily: the same for every seed."""
        template = CAPTION_PROMPT_EN if layered_params_of(batch).use_en_prompt else CAPTION_PROMPT_CN
        inputs = self.config.caption_inputs(template, batch, self.tokenizer, self.processor)
        inputs = {name: tensor.to(self.text_encoder.device) for name, tensor in inputs.items()}
        ids = self.text_encoder.generate(**inputs, max_new_tokens=MAX_CAPTION_TOKENS, do_sample=False)
        written = ids[0, inputs["input_ids"].shape[1] :]
        caption: str = self.tokenizer.decode(written, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return caption.strip()
