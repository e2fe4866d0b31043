"""Text to embeddings, through one text encoder or several."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from safelight.core.config import PipelineConfig, PromptSpec
from safelight.core.request import Req
from safelight.core.server_args import ServerArgs
from safelight.core.stage import PipelineStage, Steps


class TextEncodingStage(PipelineStage):
    """Encodes the prompt with each text encoder, and the negative prompt where the request has that branch."""

    def __init__(self, text_encoders: Sequence[Any], tokenizers: Sequence[Any], config: PipelineConfig) -> None:
        self.text_encoders = text_encoders
        self.tokenizers = tokenizers
        self.config = config

    def run(self, batch: Req, server_args: ServerArgs) -> Steps:
        """Fill `prompt_embeds` and `negative_prompt_embeds`, with a boundary between two encodings."""
        dtype = server_args.component_dtype("transformer", self.config.precisions.get("transformer"))
        for index in range(len(self.text_encoders)):
            spec = self.config.encode_prompt_spec(index, batch)
            batch.prompt_embeds.append(self._encode(index, spec, spec.prompt, batch).to(dtype))
            if self.config.should_use_guidance(batch):
                yield []
                batch.negative_prompt_embeds.append(self._encode(index, spec, spec.negative_prompt, batch).to(dtype))
            if index + 1 < len(self.text_encoders):
                yield []

    def _encode(self, index: int, spec: PromptSpec, text: str, batch: Req) -> Tensor:
        encoder = self.text_encoders[index]
        ids = self._token_ids(self.tokenizers[index], spec, text, batch)
        outputs = encoder(ids.to(encoder.device))
        embeds: Tensor = outputs.pooler_output if spec.output == "pooler_output" else outputs.last_hidden_state
        return embeds

    def _token_ids(self, tokenizer: Any, spec: PromptSpec, text: str, batch: Req) -> Tensor:
        """Return [1, max_length] token ids; a text that is cut is named in the request's warnings."""
        ids: Tensor = tokenizer(
            text, padding="max_length", max_length=spec.max_length, truncation=True, return_tensors="pt"
        ).input_ids
        num_tokens = len(tokenizer(text).input_ids)
        if num_tokens > spec.max_length:
            warning = f"prompt: {num_tokens} tokens were cut to the {spec.max_length} that a text encoder takes"
            batch.warnings.append(warning)
        return ids
