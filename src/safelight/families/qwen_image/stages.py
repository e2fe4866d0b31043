"""What comes before the loop of the layered pipeline."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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
        positions: [4, 1, S]; None before the first call.
        cache: keys and values [1, H, S, D], a pair a layer.
        image: of the first call: its patches, their grid, and what says where they are.

    """

    ids: Tensor
    positions: Tensor | None
    cache: Tree
    image: dict[str, Tensor] = field(default_factory=dict)


class QwenImageLayeredBeforeDenoisingStage(PipelineStage):
    """Writes a caption where there is no prompt, then prepares text, input image, schedule and noise.

    Args:
        modules: the model's components; it keeps tokenizer and processor, and which tokens end a caption.
        vae: encodes the input image.
        config: the model's conventions.

    """

    def __init__(self, modules: Mapping[str, Any], vae: VAE, config: QwenImageLayeredPipelineConfig) -> None:
        self.tokenizer, self.processor = modules["tokenizer"], modules["processor"]
        self.generation_config = modules["text_encoder"].generation_config
        self.config = config
        self.preparations: tuple[PipelineStage, ...] = (
            TextEncodingStage([self.tokenizer], self.processor, config),
            ImageVAEEncodingStage(vae, config),
            TimestepPreparationStage(modules["scheduler"], config),
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
        batch.stage_state = self._question(batch, server_args)
        num_given, is_over = batch.stage_state.ids.shape[1], False
        while not is_over:
            is_over = self._take(batch, num_given, (yield [self._call(batch, num_given)]))
        written = batch.stage_state.ids[0, num_given:].tolist()
        caption = self.tokenizer.decode(written, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        batch.params = dataclasses.replace(batch.params, prompt=caption.strip())

    def _question(self, batch: Req, server_args: ServerArgs) -> CaptionState:
        """Return what the caption begins with: the template, and the input image."""
        in_english = params_of(batch, QwenImageLayeredSamplingParams).use_en_prompt
        template = CAPTION_PROMPT_EN if in_english else CAPTION_PROMPT_CN
        inputs = self.config.caption_inputs(template, batch, self.tokenizer, self.processor)
        # Copies: what NumPy made of an image lies anywhere, and bytes may depend on where.
        image = {name: tensor.to(server_args.torch_device(), copy=True) for name, tensor in inputs.items()}
        return CaptionState(image.pop("input_ids"), None, [], image)

    def _call(self, batch: Req, num_given: int) -> ModelCall:
        """Return the call that writes the next tokens."""
        state = batch.stage_state
        kwargs = {"ids": state.ids, "positions": state.positions, "cache": state.cache, **state.image}
        num_written = state.ids.shape[1] - num_given
        key = batch.key("caption", num_written)
        static = {"num_tokens": min(UNIT_TOKENS, MAX_CAPTION_TOKENS - num_written)}
        return ModelCall("text_encoder", kwargs, {}, None, key, static, "write", batch.model)

    def _take(self, batch: Req, num_given: int, results: list[Any]) -> bool:
        """Keep what is continued; say whether the caption is over."""
        batch.stage_state = CaptionState(**results[0])
        ids, ends = batch.stage_state.ids[0], self.generation_config.eos_token_id
        is_ended = int(ids[-1]) in (ends if isinstance(ends, list) else [ends])
        return is_ended or len(ids) == num_given + MAX_CAPTION_TOKENS
