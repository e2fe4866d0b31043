"""Text to embeddings, through one text encoder or several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from safelight.core.calls import CallKey, ModelCall
from safelight.core.config import COND, UNCOND, PipelineConfig, PromptSpec, embeds_of, masks_of
from safelight.core.request import Req
from safelight.core.server_args import ServerArgs
from safelight.core.stage import PipelineStage, Steps


@dataclass
class TextEncodingState:
    """What is kept while an encoder runs: the mask of its tokens, [1, S]; None where it has none."""

    mask: Tensor | None


class TextEncodingStage(PipelineStage):
    """Encodes the prompt with each text encoder, and the negative prompt where the request has that branch.

    Args:
        tokenizers: one for each text encoder, in order.
        processor: of images that go with the text into the encoder; None where the model has none.
        config: the model's conventions.

    """

    def __init__(self, tokenizers: Sequence[Any], processor: Any, config: PipelineConfig) -> None:
        self.tokenizers = tokenizers
        self.processor = processor
        self.config = config

    def run(self, batch: Req, server_args: ServerArgs) -> Steps:
        """Fill the embeddings of both prompts and their masks: a call an encoder and branch, unless they are kept."""
        for index in range(len(self.tokenizers)):
            spec = self.config.encode_prompt_spec(index, batch)
            yield from self._encode(index, spec, COND, batch, server_args)
            if self.config.should_use_guidance(batch):
                yield from self._encode(index, spec, UNCOND, batch, server_args)

    def _encode(self, index: int, spec: PromptSpec, branch: str, batch: Req, server_args: ServerArgs) -> Steps:
        """Append the embeddings of a branch's text and their mask, kept or made, and warn if it was cut."""
        text = spec.prompt if branch == COND else spec.negative_prompt
        seen = self.cache.images_of(batch.params) if self.processor is not None else ()
        key = (encoder_name(index), replace(spec, prompt=text, negative_prompt=""), seen)
        found = self.cache.get(*key)
        if found is None:
            (made,) = yield [self._call(index, spec, text, batch.key(branch), batch, server_args)]
            dtype = server_args.component_dtype("transformer", self.config.precisions.get("transformer"))
            embeds, mask = self._kept(made, batch.stage_state.mask, spec)
            found = self.cache.put(embeds.to(dtype), (mask, self._cut(self.tokenizers[index], spec, text)), *key)
        embeds, (mask, warning) = found
        embeds_of(branch, batch).append(embeds)
        masks_of(branch, batch).append(None if mask is None else mask.to(embeds.device))
        if warning is not None:
            batch.warnings.append(warning)

    def _call(
        self, index: int, spec: PromptSpec, text: str, key: CallKey, batch: Req, server_args: ServerArgs
    ) -> ModelCall:
        """Return the call of a text encoder; the mask of its tokens stays in the stage's state."""
        inputs = self.config.text_encoder_inputs(spec, text, batch, self.tokenizers[index], self.processor)
        batch.stage_state = TextEncodingState(inputs.get("attention_mask"))
        given = {name: tensor for name, tensor in inputs.items() if name != "attention_mask" or spec.attention_mask}
        # Copies: what NumPy made of an image lies anywhere, and bytes may depend on where.
        kwargs = {name: tensor.to(server_args.torch_device(), copy=True) for name, tensor in given.items()}
        return ModelCall(encoder_name(index), kwargs, {}, None, key, {"output": spec.output}, "encode", batch.model)

    def _kept(self, made: Tensor, mask: Tensor | None, spec: PromptSpec) -> tuple[Tensor, Tensor | None]:
        """Return what of an encoder's output is the embedding, and on the CPU which of it is of tokens."""
        if spec.output == "pooler_output":
            return made, None
        if spec.zero_padding:
            assert mask is not None, "padding is told by a mask"
            made = torch.where(mask.to(made.device, torch.bool)[..., None], made, 0)
        kept = slice(spec.drop_prefix, None if spec.max_embeds is None else spec.drop_prefix + spec.max_embeds)
        return made[:, kept], None if mask is None else mask[:, kept].bool().cpu()

    def _cut(self, tokenizer: Any, spec: PromptSpec, text: str) -> str | None:
        """Return a warning if the text is cut."""
        num_tokens = len(tokenizer(text, verbose=False).input_ids) - spec.drop_prefix
        taken = min(spec.max_length - spec.drop_prefix, spec.max_embeds or spec.max_length)
        cut = f"prompt: {num_tokens} tokens were cut to the {taken} that a text encoder takes"
        return cut if num_tokens > taken else None


def encoder_name(index: int) -> str:
    """Return the component's name of the text encoder number `index`, from 0."""
    return f"text_encoder_{index + 1}" if index else "text_encoder"
