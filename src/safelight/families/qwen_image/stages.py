"""What comes before the loop of the layered pipeline."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from safelight.core.calls import ModelCall
from safelight.core.config import params_of
from safelight.core.request import Req
from safelight.core.server_args import ServerArgs
from safelight.core.stage import PipelineStage, Steps
from safelight.core.trees import Tree
from safelight.families.qwen_image.config import QwenImageLayeredPipelineConfig
from safelight.families.qwen_image.params import QwenImageLayeredSamplingParams, needs_caption
from safelight.families.qwen_image.prompts import CAPTION_PROMPT_CN, CAPTION_PROMPT_EN
from safelight.stages.conditioning import ConditioningStage
from safelight.stages.image_vae_encoding import ImageVAEEncodingStage
from safelight.stages.latent_preparation import LatentPreparationStage
from safelight.stages.text_encoding import TextEncodingStage
from safelight.stages.timestep_preparation import TimestepPreparationStage
from safelight.stages.vae import VAE

MAX_CAPTION_TOKENS = 512
UNIT_TOKENS = 32
"""Tokens of a caption that a model call writes."""


@dataclass
class CaptionState:
    """What a caption is continued from.

    Attributes:
        ids: [1, S].
        positions: [4, 1, S].
        cache: keys and values [1, H, S, D], a pair a layer.

    """

    ids: Tensor
    positions: Tensor
    cache: Tree


class QwenImageLayeredBeforeDenoisingStage(PipelineStage):
    """Writes a caption where there is no prompt, then prepares text, input image, schedule and noise.

    Args:
        tokenizer: the text encoder's.
        generation_config: the text encoder's: which tokens end a caption.
        processor: of images for the text encoder.
        vae: encodes the input image.
        scheduler: the solver, copied for each request.
        config: the model's conventions.

    """

    def __init__(
        self,
        *,
        tokenizer: Any,
        generation_config: Any,
        processor: Any,
        vae: VAE,
        scheduler: Any,
        config: QwenImageLayeredPipelineConfig,
    ) -> None:
        self.tokenizer = tokenizer
        self.generation_config = generation_config
        self.processor = processor
        self.config = config
        self.preparations: tuple[PipelineStage, ...] = (
            TextEncodingStage([tokenizer], processor, config),
            ImageVAEEncodingStage(vae, config),
            TimestepPreparationStage(scheduler, config),
            LatentPreparationStage(config),
            ConditioningStage(config),
        )

    def parts(self) -> Sequence[PipelineStage]:
        """Return the standard stages within."""
        return self.preparations

    def run(self, batch: Req, server_args: ServerArgs) -> Steps:
        """Fill all that the loop needs, with a boundary before each piece of work."""
        if needs_caption(batch.params.prompts()[0]):
            yield from self.write_caption(batch, server_args)
        for stage in self.preparations:
            yield []
            yield from stage.run(batch, server_args)

    def write_caption(self, batch: Req, server_args: ServerArgs) -> Steps:
        """Make the prompt what the text encoder writes about the input image, greedily: the same for every seed."""
        kwargs = self._question(batch, server_args)
        num_given, num_left = kwargs["ids"].shape[1], MAX_CAPTION_TOKENS
        while num_left:
            batch.pending = [self._call(batch, kwargs, min(UNIT_TOKENS, num_left))]
            del kwargs
            is_over = self._take(batch, (yield batch.pending))
            num_left = 0 if is_over else num_given + MAX_CAPTION_TOKENS - batch.stage_state.ids.shape[1]
            kwargs = vars(batch.stage_state)
        written = batch.stage_state.ids[0, num_given:].tolist()
        caption = self.tokenizer.decode(written, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        batch.params = dataclasses.replace(batch.params, prompt=caption.strip())

    def _question(self, batch: Req, server_args: ServerArgs) -> dict[str, Any]:
        """Return the arguments of the first call: the template, and the input image."""
        in_english = params_of(batch, QwenImageLayeredSamplingParams).use_en_prompt
        template = CAPTION_PROMPT_EN if in_english else CAPTION_PROMPT_CN
        inputs = self.config.caption_inputs(template, batch, self.tokenizer, self.processor)
        # Copies: what NumPy made of an image lies anywhere, and bytes may depend on where.
        given = {name: tensor.to(server_args.torch_device(), copy=True) for name, tensor in inputs.items()}
        return {"ids": given.pop("input_ids"), "positions": None, "cache": [], **given}

    def _call(self, batch: Req, kwargs: Mapping[str, Any], num_tokens: int) -> ModelCall:
        """Return the call that writes the next tokens, so many at most."""
        step = len(batch.stage_state.ids[0]) if batch.stage_state is not None else 0
        key, static = batch.key("caption", step), {"num_tokens": num_tokens}
        return ModelCall("text_encoder", dict(kwargs), {}, None, key, static, "write", batch.model)

    def _take(self, batch: Req, results: list[Any]) -> bool:
        """Keep what is continued; say whether the caption is over."""
        batch.pending = []
        batch.stage_state = CaptionState(**results[0])
        ends = self.generation_config.eos_token_id
        return int(batch.stage_state.ids[0, -1]) in (ends if isinstance(ends, list) else [ends])
