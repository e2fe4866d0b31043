"""Chroma's conventions, as callbacks for the shared stages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from chroma_models.params import ChromaSamplingParams
from chroma_models.transformer import ChromaArchitecture
from safelight.core.config import ComponentConfigs, PromptSpec, embeds_of, masks_of, params_of, texts_of
from safelight.core.request import Latents, Req
from safelight.core.schema import ModelTaskType
from safelight.layers.rotary import rotary_table
from safelight.stages.packed_latents import PackedLatentsConfig, unit_timestep


@dataclass(frozen=True)
class ChromaCond:
    """What the transformer is given at every step besides latents, text and time.

    Attributes:
        freqs_cis: complex64 [S_text + S_image, D/2], rotary table.
        masks: of each branch, [1, S_text]: 1 for the text's tokens and the first one of padding, 0 for the rest.

    """

    freqs_cis: Tensor
    masks: Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class ChromaPipelineConfig(PackedLatentsConfig):
    """Conventions of `ChromaPipeline`."""

    task: ClassVar[ModelTaskType] = ModelTaskType.T2I
    shared_kwargs: ClassVar[frozenset[str]] = frozenset({"freqs_cis"})
    architecture: ClassVar[type[Any]] = ChromaArchitecture

    @classmethod
    def fields_of(cls, configs: ComponentConfigs) -> dict[str, Any]:
        """Return the fields' values."""
        num_levels = len(configs["vae"].get("block_out_channels", (64,)))
        return {**super().fields_of(configs), "vae_scale_factor": 2 ** (num_levels - 1)}

    def encode_prompt_spec(self, index: int, batch: Req) -> PromptSpec:
        """Return how T5 takes the text: told what is padding, whose embeddings stay."""
        length = params_of(batch, ChromaSamplingParams).max_sequence_length
        assert length is not None
        return PromptSpec(*texts_of(batch), length, "last_hidden_state", attention_mask=True)

    def prepare_cond(self, batch: Req, device: torch.device, dtype: torch.dtype) -> ChromaCond:
        """Return the rotary table of text, all at the origin, and picture; and the texts' masks."""
        ((rows, columns),) = self.token_grids(batch)
        text = torch.zeros(batch.prompt_embeds[0].shape[1], 3, device=device)
        axes = (torch.arange(size, device=device) for size in (1, rows, columns))
        freqs_cis = rotary_table(torch.cat((text, torch.cartesian_prod(*axes))), self.axes_dims_rope)
        masks = {branch: seen_by_the_transformer(masks_of(branch, batch)[0], dtype) for branch in self.branches(batch)}
        return ChromaCond(freqs_cis, masks)

    def transformer_kwargs(self, branch: str, batch: Req, latent_model_input: Latents, t: Tensor) -> dict[str, Tensor]:
        """Return the transformer's arguments."""
        assert isinstance(latent_model_input, Tensor)
        return {
            "hidden_states": latent_model_input,
            "encoder_hidden_states": embeds_of(branch, batch)[0],
            "encoder_hidden_states_mask": batch.cond.masks[branch],
            "timestep": unit_timestep(t, latent_model_input),
            "freqs_cis": batch.cond.freqs_cis,
        }


def seen_by_the_transformer(mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return [1, S_text], 1 for the text's tokens and for the first one of padding, and 0 for the rest."""
    assert mask is not None
    places = torch.arange(mask.shape[1], device=mask.device)
    return (places <= mask.sum(dim=1, keepdim=True)).to(dtype)
