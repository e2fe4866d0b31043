"""FLUX.1's conventions, as callbacks for the shared stages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from safelight.core.config import PipelineConfig, PromptSpec, check_field, check_rotary
from safelight.core.params import SamplingParams
from safelight.core.request import Latents, Prediction, Req
from safelight.core.schema import ModelSchema, ModelTaskType
from safelight.families.flux.params import (
    EMBEDDED_GUIDANCE,
    OWN_SIGMAS,
    FluxKontextSamplingParams,
    FluxSamplingParams,
)
from safelight.layers.packing import PATCH_SIZE, pack_latents, unpack_latents
from safelight.layers.pixels import image_to_tensor
from safelight.layers.rotary import rotary_table
from safelight.stages.schedule import check_takes_sigmas, linear_mu, linear_sigmas

DEFAULT_SAMPLE_SIZE = 128
"""Latent pixels along one side of a picture, unless asked otherwise."""

_PORTRAITS = ((672, 1568), (688, 1504), (720, 1456), (752, 1392), (800, 1328), (832, 1248), (880, 1184), (944, 1104))
KONTEXT_RESOLUTIONS = (*_PORTRAITS, (1024, 1024), *((height, width) for width, height in reversed(_PORTRAITS)))
"""(width, height) of the pictures that Kontext was trained on."""


@dataclass(frozen=True)
class FluxCond:
    """What the transformer is given at every step besides latents and time.

    Attributes:
        freqs_cis: complex64 [S_text + S_image, D/2], rotary table.
        guidance: [1] float32, or None without embedded guidance.
        image_tokens: [1, S, C], the input image's packed latents, or None.

    """

    freqs_cis: Tensor
    guidance: Tensor | None
    image_tokens: Tensor | None = None


def position_ids(height: int, width: int, image: int, device: torch.device) -> Tensor:
    """Return float32 [height * width, 3]: the image's number, row and column of each token."""
    rows = torch.arange(height, dtype=torch.float32, device=device).repeat_interleave(width)
    columns = torch.arange(width, dtype=torch.float32, device=device).repeat(height)
    return torch.stack((torch.full_like(rows, image), rows, columns), dim=-1)


@dataclass(frozen=True, kw_only=True)
class FluxPipelineConfig(PipelineConfig):
    """Conventions of `FluxPipeline`.

    Attributes:
        axes_dims_rope: channels of a head that turn with image number, row and column.
        guidance_embeds: whether the guidance scale is an input of the transformer.
        clip_length: tokens of the CLIP encoder.
        own_sigmas: whether the solver spaces its noise levels itself.

    """

    task: ClassVar[ModelTaskType] = ModelTaskType.T2I
    shared_kwargs: ClassVar[frozenset[str]] = frozenset({"freqs_cis"})
    leaves_flow_sigmas: ClassVar[bool] = True
    """Whether a solver with `use_flow_sigmas` is left to space them, as the reference does."""

    axes_dims_rope: tuple[int, ...]
    guidance_embeds: bool
    clip_length: int
    own_sigmas: bool

    @classmethod
    def from_model(cls, component_configs: Mapping[str, Mapping[str, Any]]) -> Self:
        """Build from the components' JSON.

        Raises:
            ModelIndexError: if the components do not fit each other.

        """
        transformer, vae = component_configs["transformer"], component_configs["vae"]
        check_takes_sigmas(component_configs)
        check_components(component_configs)
        return cls(
            vae_scale_factor=2 ** (len(vae.get("block_out_channels", (64,))) - 1),
            latent_channels=transformer.get("in_channels", 64) // PATCH_SIZE**2,
            vae_scale=vae.get("scaling_factor", 0.18215),
            vae_shift=vae.get("shift_factor") or 0.0,
            axes_dims_rope=tuple(transformer.get("axes_dims_rope", (16, 56, 56))),
            guidance_embeds=transformer.get("guidance_embeds", False),
            clip_length=clip_length(component_configs),
            own_sigmas=cls.leaves_flow_sigmas and bool(component_configs["scheduler"].get("use_flow_sigmas")),
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
            num_input_images=(0, 1 if "image" in params_cls.options() else 0),
            capabilities=frozenset(
                name
                for name, holds in ((EMBEDDED_GUIDANCE, self.guidance_embeds), (OWN_SIGMAS, self.own_sigmas))
                if holds
            ),
        )

    def encode_prompt_spec(self, index: int, batch: Req) -> PromptSpec:
        """Return how CLIP (0), which is pooled, and T5 (1) take the text."""
        params = params_of(batch)
        prompt, negative = params.prompts()[0], negative_prompt_of(params)
        if index == 0:
            return PromptSpec(prompt, negative, self.clip_length, "pooler_output")
        assert params.max_sequence_length is not None
        second, negative_second = params.prompt_2 or prompt, params.negative_prompt_2 or negative
        return PromptSpec(second, negative_second, params.max_sequence_length, "last_hidden_state")

    def output_size(self, batch: Req) -> tuple[int, int]:
        """Return the (height, width) in pixels that is made."""
        params = params_of(batch)
        assert params.height is not None and params.width is not None
        return params.height, params.width

    def prepare_latent_shape(self, batch: Req) -> tuple[int, ...]:
        """Return [1, C, H, W] in latent pixels."""
        height, width = self.output_size(batch)
        return (1, self.latent_channels, height // self.vae_scale_factor, width // self.vae_scale_factor)

    def maybe_pack_latents(self, latents: Tensor, batch: Req) -> Latents:
        """Return [1, S, 4C]."""
        return pack_latents(latents)

    def post_denoising_loop(self, latents: Latents, batch: Req) -> Tensor:
        """Return [1, C, H, W] of packed latents."""
        assert isinstance(latents, Tensor)
        return unpack_latents(latents, *batch.raw_latent_shape[2:])

    def prepare_sigmas(self, batch: Req) -> list[float] | None:
        """Return the noise levels asked for, or even ones from 1 to 1/steps; None where the solver has its own."""
        params = params_of(batch)
        if self.own_sigmas:
            return None
        if params.sigmas is not None:
            return list(params.sigmas)
        assert params.num_inference_steps is not None
        return linear_sigmas(params.num_inference_steps)

    def prepare_mu(self, batch: Req, scheduler_config: Mapping[str, Any]) -> float | None:
        """Return the shift for this many image tokens, on the line through the scheduler's two points."""
        _, _, height, width = self.prepare_latent_shape(batch)
        return linear_mu(height // PATCH_SIZE * (width // PATCH_SIZE), scheduler_config)

    def prepare_cond(self, batch: Req, device: torch.device, dtype: torch.dtype) -> FluxCond:
        """Return rotary table, guidance and input image."""
        params = params_of(batch)
        guidance = torch.tensor([params.guidance_scale], device=device) if self.guidance_embeds else None
        tokens = [pack_latents(latents.to(dtype)) for latents in batch.image_latents]
        image_tokens = torch.cat(tokens, dim=1) if tokens else None
        return FluxCond(self.get_freqs_cis(batch, device), guidance, image_tokens)

    def get_freqs_cis(self, batch: Req, device: torch.device) -> Tensor:
        """Return the rotary table of text (all at the origin), picture and input image, in this order."""
        text_ids = torch.zeros(batch.prompt_embeds[1].shape[1], 3, device=device)
        grids = [batch.raw_latent_shape, *(latents.shape for latents in batch.image_latents)]
        image_ids = [
            position_ids(shape[2] // PATCH_SIZE, shape[3] // PATCH_SIZE, number, device)
            for number, shape in enumerate(grids)
        ]
        return rotary_table(torch.cat((text_ids, *image_ids)), self.axes_dims_rope)

    def guidance_scale(self, batch: Req, t: Tensor) -> float:
        """Return `true_cfg_scale`."""
        scale = params_of(batch).true_cfg_scale
        assert scale is not None
        return scale

    def prepare_pos_cond_kwargs(self, batch: Req, latent_model_input: Latents, t: Tensor) -> dict[str, Tensor]:
        """Return the transformer's arguments with the prompt."""
        return self._transformer_kwargs(batch, batch.prompt_embeds, latent_model_input, t)

    def prepare_neg_cond_kwargs(self, batch: Req, latent_model_input: Latents, t: Tensor) -> dict[str, Tensor]:
        """Return the transformer's arguments with the negative prompt."""
        return self._transformer_kwargs(batch, batch.negative_prompt_embeds, latent_model_input, t)

    def _transformer_kwargs(
        self, batch: Req, embeds: list[Tensor], latent_model_input: Latents, t: Tensor
    ) -> dict[str, Tensor]:
        assert isinstance(latent_model_input, Tensor)
        cond: FluxCond = batch.cond
        tokens = latent_model_input
        if cond.image_tokens is not None:
            tokens = torch.cat((tokens, cond.image_tokens), dim=1)
        kwargs = {
            "hidden_states": tokens,
            "encoder_hidden_states": embeds[1],
            "pooled_projections": embeds[0],
            # Rounded to the latents' dtype before the division, as the reference does.
            "timestep": t.expand(latent_model_input.shape[0]).to(latent_model_input.dtype) / 1000,
            "freqs_cis": cond.freqs_cis,
        }
        return kwargs if cond.guidance is None else {**kwargs, "guidance": cond.guidance}


def check_components(component_configs: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse components that do not fit each other: a request would end where they meet."""
    transformer = component_configs["transformer"]
    channels = transformer.get("in_channels", 64)
    check_field("transformer", "in_channels", channels, (component_configs["vae"].get("latent_channels", 4) * 4,))
    made = (transformer.get("out_channels") or channels) * transformer.get("patch_size", 1) ** 2
    check_field("transformer", "out_channels, times patch_size squared", made, (channels,))
    head_dim = transformer.get("attention_head_dim", 128)
    check_rotary("transformer", transformer.get("axes_dims_rope", (16, 56, 56)), 3, head_dim)
    widths = (
        ("joint_attention_dim", 4096, "text_encoder_2", "d_model"),
        ("pooled_projection_dim", 768, "text_encoder", "hidden_size"),
    )
    for name, default, encoder, width in widths:
        given = component_configs[encoder].get(width)
        if given is not None:
            check_field("transformer", name, transformer.get(name, default), (given,))
    length, positions = clip_length(component_configs), component_configs["text_encoder"].get("max_position_embeddings")
    if positions is not None and not 1 <= length <= positions:
        check_field("tokenizer", "model_max_length", length, (positions,))


def clip_length(component_configs: Mapping[str, Mapping[str, Any]]) -> int:
    """Return the tokens that CLIP's texts are filled up to."""
    length: int = component_configs["tokenizer"].get("model_max_length", 77)
    return length


@dataclass(frozen=True, kw_only=True)
class FluxKontextPipelineConfig(FluxPipelineConfig):
    """Conventions of `FluxKontextPipeline`: the input image's tokens follow the picture's."""

    task: ClassVar[ModelTaskType] = ModelTaskType.TI2I
    leaves_flow_sigmas: ClassVar[bool] = False

    def output_size(self, batch: Req) -> tuple[int, int]:
        """Return the (height, width) in pixels, fitted to `max_area`."""
        params = batch.params
        assert isinstance(params, FluxKontextSamplingParams)
        return params.fitted_size(self.vae_scale_factor * PATCH_SIZE)

    def prepare_vae_input(self, batch: Req, index: int) -> Tensor:
        """Return the input image, [1, 3, H, W], at the trained size of the nearest aspect or about its own size."""
        params = batch.params
        assert isinstance(params, FluxKontextSamplingParams) and params.image is not None
        multiple = self.vae_scale_factor * PATCH_SIZE
        # The reference measures the aspect on sides that are whole multiples already.
        width, height = (side // multiple * multiple for side in params.image[index].size)
        if params.auto_resize:
            aspect = width / height
            _, width, height = min((abs(aspect - w / h), w, h) for w, h in KONTEXT_RESOLUTIONS)
        return image_to_tensor(params.image[index], height // multiple * multiple, width // multiple * multiple)

    def combine_guidance(self, batch: Req, predictions: Sequence[Prediction], t: Tensor) -> Prediction:
        """Join the branches, over the picture's own tokens only."""
        assert isinstance(batch.latents, Tensor)
        num_tokens = batch.latents.shape[1]
        return super().combine_guidance(
            batch, [tokens[:, :num_tokens] for tokens in predictions if isinstance(tokens, Tensor)], t
        )


def params_of(batch: Req) -> FluxSamplingParams:
    """Return the request's parameters as this family's."""
    assert isinstance(batch.params, FluxSamplingParams)
    return batch.params


def negative_prompt_of(params: FluxSamplingParams) -> str:
    """Return the negative prompt, empty if there is none."""
    assert not isinstance(params.negative_prompt, tuple)
    return params.negative_prompt or ""
