"""Text to embeddings, through one text encoder or several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from safelight.core.config import PipelineConfig, PromptSpec
from safelight.core.request import Req
from safelight.core.server_args import ServerArgs
from safelight.core.stage import PipelineStage, Steps


class TextEncodingStage(PipelineStage):
    """Encodes the prompt with each text encoder, and the negative prompt where the request has that branch.

    Args:
        text_encoders: the modules, in order.
        tokenizers: one for each.
        processor: of images that go with the text into the encoder; None where the model has none.
        config: the model's conventions.

    """

    def __init__(
        self, text_encoders: Sequence[Any], tokenizers: Sequence[Any], processor: Any, config: PipelineConfig
    ) -> None:
        self.text_encoders = text_encoders
        self.tokenizers = tokenizers
        self.processor = processor
        self.config = config

    def needed_modules(self, batch: Req) -> Sequence[nn.Module]:
        """Return the text encoder that is next."""
        guided = self.config.should_use_guidance(batch)
        index = len(batch.negative_prompt_embeds if guided else batch.prompt_embeds)
        return self.text_encoders[index : index + 1]

    def run(self, batch: Req, server_args: ServerArgs) -> Steps:
        """Fill `prompt_embeds` and `negative_prompt_embeds`, with a boundary between two encodings."""
        dtype = server_args.component_dtype("transformer", self.config.precisions.get("transformer"))
        for index in range(len(self.text_encoders)):
            spec = self.config.encode_prompt_spec(index, batch)
            embeds, mask = self._encode(index, spec, spec.prompt, batch, dtype)
            batch.prompt_embeds.append(embeds)
            batch.prompt_embeds_mask.append(mask)
            del embeds, mask  # no local variable holds a tensor at a yield
            if self.config.should_use_guidance(batch):
                yield []
                embeds, mask = self._encode(index, spec, spec.negative_prompt, batch, dtype)
                batch.negative_prompt_embeds.append(embeds)
                batch.negative_prompt_embeds_mask.append(mask)
                del embeds, mask
            if index + 1 < len(self.text_encoders):
                yield []

    def _encode(
        self, index: int, spec: PromptSpec, text: str, batch: Req, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor | None]:
        """Return the embeddings of a text and their mask, kept or made, and warn if it was cut."""
        seen = self.cache.images_of(batch.params) if self.processor is not None else ()
        key = (encoder_name(index), replace(spec, prompt=text, negative_prompt=""), seen)
        found = self.cache.get(*key)
        if found is None:
            embeds, mask = self._make(index, spec, text, batch)
            found = self.cache.put(embeds.to(dtype), (mask, self._cut(self.tokenizers[index], spec, text)), *key)
        embeds, (mask, warning) = found
        if warning is not None:
            batch.warnings.append(warning)
        return embeds, None if mask is None else mask.to(embeds.device, copy=True)

    def _make(self, index: int, spec: PromptSpec, text: str, batch: Req) -> tuple[Tensor, Tensor | None]:
        """Return the embeddings of a text, and on the CPU which of them are of its tokens."""
        encoder, tokenizer = self.text_encoders[index], self.tokenizers[index]
        inputs = self.config.text_encoder_inputs(spec, text, batch, tokenizer, self.processor)
        # Copies: what NumPy made of an image lies anywhere, and bytes may depend on where.
        given = {name: tensor for name, tensor in inputs.items() if name != "attention_mask" or spec.attention_mask}
        outputs = encoder(**{name: tensor.to(encoder.device, copy=True) for name, tensor in given.items()})
        if spec.output == "pooler_output":
            return outputs.pooler_output, None
        embeds: Tensor = outputs.last_hidden_state
        if spec.zero_padding:
            embeds = torch.where(inputs["attention_mask"].to(embeds.device, torch.bool)[..., None], embeds, 0)
        kept = slice(spec.drop_prefix, None if spec.max_embeds is None else spec.drop_prefix + spec.max_embeds)
        mask = inputs.get("attention_mask")
        return embeds[:, kept], None if mask is None else mask[:, kept].bool()

    def _cut(self, tokenizer: Any, spec: PromptSpec, text: str) -> str | None:
        """Return a warning if the text is cut."""
        num_tokens = len(tokenizer(text, verbose=False).input_ids) - spec.drop_prefix
        taken = min(spec.max_length - spec.drop_prefix, spec.max_embeds or spec.max_length)
        cut = f"prompt: {num_tokens} tokens were cut to the {taken} that a text encoder takes"
        return cut if num_tokens > taken else None


def encoder_name(index: int) -> str:
    """Return the component's name of the text encoder number `index`, from 0."""
    return f"text_encoder_{index + 1}" if index else "text_encoder"
