"""What comes before the loop of the layered pipeline."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.generation import GenerateDecoderOnlyOutput

from safelight.core.config import params_of
from safelight.core.request import Req
from safelight.core.server_args import ServerArgs
from safelight.core.stage import PipelineStage, Steps
from safelight.families.qwen_image.config import QwenImageLayeredPipelineConfig
from safelight.families.qwen_image.params import QwenImageLayeredSamplingParams, needs_caption
from safelight.families.qwen_image.prompts import CAPTION_PROMPT_CN, CAPTION_PROMPT_EN
from safelight.stages.conditioning import ConditioningStage
from safelight.stages.image_vae_encoding import ImageVAEEncodingStage
from safelight.stages.latent_preparation import LatentPreparationStage
from safelight.stages.text_encoding import TextEncodingStage
from safelight.stages.timestep_preparation import TimestepPreparationStage

MAX_CAPTION_TOKENS = 512
UNIT_TOKENS = 32
"""Tokens of a caption that are written between two boundaries."""
IDS, POSITIONS, KEYS, VALUES = "caption_ids", "caption_positions", "caption_keys", "caption_values"
"""In the feature cache, while a caption is written: one tensor of ids [1, S], one of positions [4, 1, S] (the token's
number, then its time, row and column), and a tensor [1, H, S, D] a layer."""


def cache_name(output_cls: type) -> str:
    """Return what `generate` calls its keys and values, as an argument and in its output: 5.24 renamed them."""
    names = {field.name for field in dataclasses.fields(output_cls)}
    return "cache" if "cache" in names else "past_key_values"


CACHE = cache_name(GenerateDecoderOnlyOutput)


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

    def parts(self) -> Sequence[PipelineStage]:
        """Return the standard stages within."""
        return self.preparations

    def needed_modules(self, batch: Req) -> Sequence[nn.Module]:
        """Return what is next: the text encoder, which writes the caption too, and then the VAE."""
        return next(filter(None, (stage.needed_modules(batch) for stage in self.preparations)), ())

    def run(self, batch: Req, server_args: ServerArgs) -> Steps:
        """Fill all that the loop needs, with a boundary before each piece of work."""
        if needs_caption(batch.params.prompts()[0]):
            yield from self.write_caption(batch)
        for stage in self.preparations:
            yield []
            yield from stage.run(batch, server_args)

    def write_caption(self, batch: Req) -> Steps:
        """Make the prompt what the text encoder writes about the input image, greedily: the same for every seed."""
        ends = self.text_encoder.generation_config.eos_token_id
        written = self._begin_caption(batch)
        while len(written) < MAX_CAPTION_TOKENS and written[-1] not in (ends if isinstance(ends, list) else [ends]):
            yield []
            written += self._write(batch, min(UNIT_TOKENS, MAX_CAPTION_TOKENS - len(written)))
        batch.feature_cache = {}
        caption = self.tokenizer.decode(written, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        batch.params = dataclasses.replace(batch.params, prompt=caption.strip())

    def _begin_caption(self, batch: Req) -> list[int]:
        """Lay what is continued into the feature cache, and return the caption's first tokens."""
        template = (
            CAPTION_PROMPT_EN if params_of(batch, QwenImageLayeredSamplingParams).use_en_prompt else CAPTION_PROMPT_CN
        )
        inputs = self.config.caption_inputs(template, batch, self.tokenizer, self.processor)
        # Copies: what NumPy made lies anywhere, and bytes may depend on where.
        inputs = {name: tensor.to(self.text_encoder.device, copy=True) for name, tensor in inputs.items()}
        ids, pixels, grid = (inputs.pop(name) for name in ("input_ids", "pixel_values", "image_grid_thw"))
        places, _ = self.text_encoder.model.get_rope_index(ids, image_grid_thw=grid, **inputs)  # [3, 1, S]
        positions = torch.cat((torch.arange(ids.shape[1], device=ids.device).expand(1, 1, -1), places))
        batch.feature_cache = {IDS: [ids], POSITIONS: [positions], KEYS: [], VALUES: []}
        return self._write(batch, UNIT_TOKENS, pixel_values=pixels, image_grid_thw=grid)

    def _write(self, batch: Req, num_tokens: int, **image: Tensor) -> list[int]:
        """Return the next tokens, so many at most, and remember keys and values.

        Positions are always given, or the text encoder would take those of whichever image it saw last.
        """
        (ids,), (positions,) = batch.feature_cache[IDS], batch.feature_cache[POSITIONS]
        made = self.text_encoder.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            position_ids=positions,
            max_new_tokens=num_tokens,
            do_sample=False,
            return_dict_in_generate=True,
            **{CACHE: DynamicCache(zip(batch.feature_cache[KEYS], batch.feature_cache[VALUES], strict=True))},
            **image,
        )
        written = made["sequences"][:, ids.shape[1] :]
        following = positions[..., -1:] + torch.arange(1, written.shape[1] + 1, device=ids.device)
        batch.feature_cache = {
            IDS: [made["sequences"]],
            POSITIONS: [torch.cat((positions, following), dim=-1)],
            KEYS: [layer.keys for layer in made[CACHE].layers],
            VALUES: [layer.values for layer in made[CACHE].layers],
        }
        new_ids: list[int] = written[0].tolist()
        return new_ids
