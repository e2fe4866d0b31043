"""Chroma's conventions, as callbacks for the shared stages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from chroma_models.params import ChromaSamplingParams
from safelight.core.config import PipelineConfig, PromptSpec, check_field, check_rotary
from safelight.core.params import SamplingParams
from safelight.core.request import Latents, Req
from safelight.core.schema import ModelSchema, ModelTaskType
from safelight.layers.packing import PATCH_SIZE, pack_latents, unpack_latents
from safelight.layers.rotary import rotary_table
from safelight.stages.schedule import check_takes_sigmas, linear_mu, linear_sigmas

DEFAULT_SAMPLE_SIZE = 128
"""Latent pixels along one side of a picture, unless asked otherwise."""


@dataclass(frozen=True)
class ChromaCond:
    """What the transformer is given at every step besides latents, text and time.

    Attributes:
        freqs_cis: complex64 [S_text + S_image, D/2], rotary table.
        mask: [1, S_text], 1 for the prompt's tokens and one of padding, 0 for the rest.
        negative_mask: the same of the negative prompt; None without one.

    """

    freqs_cis: Tensor
    mask: Tensor
    negative_mask: Tensor | None


@dataclass(frozen=True, kw_only=True)
class ChromaPipelineConfig(PipelineConfig):
    """Conventions of `ChromaPipeline`.

    Attributes:
        axes_dims_rope: channels of a head that turn with image number, row and column.

    """

    task: ClassVar[ModelTaskType] = ModelTaskType.T2I
    shared_kwargs: ClassVar[frozenset[str]] = frozenset({"freqs_cis"})

    axes_dims_rope: tuple[int, ...]

    @classmethod
    def from_model(cls, component_configs: Mapping[str, Mapping[str, Any]]) -> Self:
        """Build from the components' JSON.

        Raises:
            ModelIndexError: if the components do not fit each other.

        """
        transformer, vae = component_configs["transformer"], component_configs["vae"]
        channels, axes = transformer.get("in_channels", 64), tuple(transformer.get("axes_dims_rope", (16, 56, 56)))
        check_takes_sigmas(component_configs)
        check_field("transformer", "in_channels", channels, (vae.get("latent_channels", 4) * PATCH_SIZE**2,))
        check_rotary("transformer", axes, 3, transformer.get("attention_head_dim", 128))
        return cls(
            vae_scale_factor=2 ** (len(vae.get("block_out_channels", (64,))) - 1),
            latent_channels=channels // PATCH_SIZE**2,
            vae_scale=vae.get("scaling_factor", 0.18215),
            vae_shift=vae.get("shift_factor") or 0.0,
            axes_dims_rope=axes,
        )

    def model_schema(
        self, model: str, pipeline_name: str, params_cls: type[SamplingParams], defaults: Mapping[str, Any]
    ) -> ModelSchema:
        """Say what the loaded model takes."""
        side = DEFAULT_SAMPLE_SIZE * self.vae_scale_factor
        return ModelSchema(
            model=model,
            pipeline_name=pipeline_name,
            task=self.task,
            params_cls=params_cls,
            defaults={**params_cls.defaults, "height": side, "width": side, **defaults},
            size_multiple=self.vae_scale_factor * PATCH_SIZE,
        )

    def encode_prompt_spec(self, index: int, batch: Req) -> PromptSpec:
        """Return how T5 takes the text: told what is padding, whose embeddings stay."""
        params = params_of(batch)
        assert params.max_sequence_length is not None and not isinstance(params.negative_prompt, tuple)
        texts = params.prompts()[0], params.negative_prompt or ""
        return PromptSpec(*texts, params.max_sequence_length, "last_hidden_state", attention_mask=True)

    def prepare_latent_shape(self, batch: Req) -> tuple[int, ...]:
        """Return [1, C, H, W] in latent pixels."""
        params = batch.params
        assert params.height is not None and params.width is not None
        return (1, self.latent_channels, params.height // self.vae_scale_factor, params.width // self.vae_scale_factor)

    def maybe_pack_latents(self, latents: Tensor, batch: Req) -> Latents:
        """Return [1, S, 4C]."""
        return pack_latents(latents)

    def post_denoising_loop(self, latents: Latents, batch: Req) -> Tensor:
        """Return [1, C, H, W] of packed latents."""
        assert isinstance(latents, Tensor)
        return unpack_latents(latents, *batch.raw_latent_shape[2:])

    def prepare_sigmas(self, batch: Req) -> list[float] | None:
        """Return the noise levels asked for, or even ones from 1 to 1/steps."""
        params = params_of(batch)
        assert params.num_inference_steps is not None
        return list(params.sigmas) if params.sigmas is not None else linear_sigmas(params.num_inference_steps)

    def prepare_mu(self, batch: Req, scheduler_config: Mapping[str, Any]) -> float | None:
        """Return the shift for this many image tokens."""
        _, _, height, width = self.prepare_latent_shape(batch)
        return linear_mu(height // PATCH_SIZE * (width // PATCH_SIZE), scheduler_config)

    def prepare_cond(self, batch: Req, device: torch.device, dtype: torch.dtype) -> ChromaCond:
        """Return the rotary table of text, all at the origin, and picture; and the texts' masks."""
        rows, columns = (torch.arange(side // PATCH_SIZE, device=device) for side in batch.raw_latent_shape[2:])
        text = torch.zeros(batch.prompt_embeds[0].shape[1], 3, device=device)
        image = torch.cartesian_prod(rows.new_zeros(1), rows, columns)
        freqs_cis = rotary_table(torch.cat((text, image)), self.axes_dims_rope)
        negative = batch.negative_prompt_embeds_mask
        mask = seen_by_the_transformer(batch.prompt_embeds_mask, dtype)
        return ChromaCond(freqs_cis, mask, seen_by_the_transformer(negative, dtype) if negative else None)

    def guidance_scale(self, batch: Req, t: Tensor) -> float:
        """Return the scale, the same at every step."""
        assert batch.params.guidance_scale is not None
        return batch.params.guidance_scale

    def prepare_pos_cond_kwargs(self, batch: Req, latent_model_input: Latents, t: Tensor) -> dict[str, Tensor]:
        """Return the transformer's arguments with the prompt."""
        return transformer_kwargs(batch, batch.prompt_embeds[0], batch.cond.mask, latent_model_input, t)

    def prepare_neg_cond_kwargs(self, batch: Req, latent_model_input: Latents, t: Tensor) -> dict[str, Tensor]:
        """Return the transformer's arguments with the negative prompt."""
        embeds = batch.negative_prompt_embeds[0]
        return transformer_kwargs(batch, embeds, batch.cond.negative_mask, latent_model_input, t)


def transformer_kwargs(batch: Req, embeds: Tensor, mask: Tensor, latents: Latents, t: Tensor) -> dict[str, Tensor]:
    """Return the arguments of a branch's call."""
    assert isinstance(latents, Tensor)
    return {
        "hidden_states": latents,
        "encoder_hidden_states": embeds,
        "encoder_hidden_states_mask": mask,
        # Rounded to the latents' dtype before the division, as the reference does.
        "timestep": t.expand(latents.shape[0]).to(latents.dtype) / 1000,
        "freqs_cis": batch.cond.freqs_cis,
    }


def seen_by_the_transformer(masks: Sequence[Tensor | None], dtype: torch.dtype) -> Tensor:
    """Return [1, S_text], 1 for the text's tokens and for the first one of padding, and 0 for the rest."""
    (mask,) = masks
    assert mask is not None
    places = torch.arange(mask.shape[1], device=mask.device)
    return (places <= mask.sum(dim=1, keepdim=True)).to(dtype)


def params_of(batch: Req) -> ChromaSamplingParams:
    """Return the request's parameters as this family's."""
    assert isinstance(batch.params, ChromaSamplingParams)
    return batch.params
