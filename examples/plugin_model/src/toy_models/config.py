"""The toy models' conventions, as callbacks for the shared stages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from safelight.core.config import PipelineConfig, PromptSpec
from safelight.core.params import SamplingParams
from safelight.core.request import Latents, Req
from safelight.core.schema import ModelSchema, ModelTaskType
from safelight.layers.packing import PATCH_SIZE, pack_latents, unpack_latents
from safelight.layers.pixels import image_to_tensor
from safelight.layers.rotary import rotary_table
from safelight.stages.schedule import linear_sigmas


@dataclass(frozen=True)
class ToyCond:
    """What the transformer is given at every step besides latents, text and time.

    Attributes:
        freqs_cis: complex64 [S_text + S_image, D/2], rotary table.

    """

    freqs_cis: Tensor


@dataclass(frozen=True, kw_only=True)
class ToyPipelineConfig(PipelineConfig):
    """Conventions of `ToyPipeline`.

    Attributes:
        axes_dims: channels of a head that turn with row and column.
        text_length: tokens of the text encoder.

    """

    task: ClassVar[ModelTaskType] = ModelTaskType.T2I
    shared_kwargs: ClassVar[frozenset[str]] = frozenset({"freqs_cis"})

    axes_dims: tuple[int, int]
    text_length: int

    @classmethod
    def from_model(cls, component_configs: Mapping[str, Mapping[str, Any]]) -> Self:
        """Build from the components' JSON."""
        transformer, vae = component_configs["transformer"], component_configs["vae"]
        half = transformer["attention_head_dim"] // 2
        return cls(
            vae_scale_factor=2 ** (len(vae["block_out_channels"]) - 1),
            latent_channels=vae["latent_channels"],
            vae_scale=vae["scaling_factor"],
            vae_shift=vae.get("shift_factor") or 0.0,
            axes_dims=(half, half),
            text_length=component_configs["tokenizer"]["model_max_length"],
        )

    def model_schema(
        self, model: str, pipeline_name: str, params_cls: type[SamplingParams], defaults: Mapping[str, Any]
    ) -> ModelSchema:
        """Say what the loaded model takes."""
        num_images = 1 if "image" in params_cls.options() else 0
        return ModelSchema(
            model=model,
            pipeline_name=pipeline_name,
            task=self.task,
            params_cls=params_cls,
            defaults={**params_cls.defaults, **defaults},
            size_multiple=self.vae_scale_factor * PATCH_SIZE,
            num_input_images=(num_images, num_images),
        )

    def encode_prompt_spec(self, index: int, batch: Req) -> PromptSpec:
        """Return how CLIP takes the text."""
        negative = batch.params.negative_prompt or ""
        assert isinstance(negative, str)
        return PromptSpec(batch.params.prompts()[0], negative, self.text_length, "last_hidden_state")

    def prepare_latent_shape(self, batch: Req) -> tuple[int, ...]:
        """Return [1, C, H, W] in latent pixels."""
        height, width = size_of(batch)
        return (1, self.latent_channels, height // self.vae_scale_factor, width // self.vae_scale_factor)

    def maybe_pack_latents(self, latents: Tensor, batch: Req) -> Latents:
        """Return [1, S, 4C]."""
        return pack_latents(latents)

    def post_denoising_loop(self, latents: Latents, batch: Req) -> Tensor:
        """Return [1, C, H, W]."""
        assert isinstance(latents, Tensor)
        return unpack_latents(latents, *batch.raw_latent_shape[2:])

    def prepare_sigmas(self, batch: Req) -> list[float] | None:
        """Return evenly spaced noise levels; the solver shifts them."""
        assert batch.params.num_inference_steps is not None
        return linear_sigmas(batch.params.num_inference_steps)

    def prepare_cond(self, batch: Req, device: torch.device, dtype: torch.dtype) -> ToyCond:
        """Return the rotary table of text, all at the origin, and picture."""
        rows, columns = (side // PATCH_SIZE for side in batch.raw_latent_shape[2:])
        text = torch.zeros(batch.prompt_embeds[0].shape[1], 2, device=device)
        image = torch.cartesian_prod(torch.arange(rows, device=device), torch.arange(columns, device=device))
        return ToyCond(rotary_table(torch.cat((text, image)), self.axes_dims))

    def should_use_guidance(self, batch: Req) -> bool:
        """Guidance needs a scale above 1."""
        return batch.params.guidance_scale is not None and batch.params.guidance_scale > 1

    def guidance_scale(self, batch: Req, t: Tensor) -> float:
        """Return the scale, the same at every step."""
        assert batch.params.guidance_scale is not None
        return batch.params.guidance_scale

    def prepare_pos_cond_kwargs(self, batch: Req, latent_model_input: Latents, t: Tensor) -> dict[str, Tensor]:
        """Return the transformer's arguments with the prompt."""
        return transformer_kwargs(batch, batch.prompt_embeds[0], latent_model_input, t)

    def prepare_neg_cond_kwargs(self, batch: Req, latent_model_input: Latents, t: Tensor) -> dict[str, Tensor]:
        """Return the transformer's arguments with the negative prompt."""
        return transformer_kwargs(batch, batch.negative_prompt_embeds[0], latent_model_input, t)


@dataclass(frozen=True, kw_only=True)
class ToyVariationPipelineConfig(ToyPipelineConfig):
    """Conventions of `ToyVariationPipeline`: those of `ToyPipeline`, and how the image goes into the VAE."""

    task: ClassVar[ModelTaskType] = ModelTaskType.TI2I

    def prepare_vae_input(self, batch: Req, index: int) -> Tensor:
        """Return the image at the size that is made, [1, 3, H, W]."""
        assert batch.params.image is not None
        return image_to_tensor(batch.params.image[index], *size_of(batch))


def transformer_kwargs(batch: Req, embeds: Tensor, latents: Latents, t: Tensor) -> dict[str, Tensor]:
    """Return the arguments of a call: all but those in `shared_kwargs` have a batch dimension."""
    assert isinstance(latents, Tensor)
    return {
        "hidden_states": latents,
        "encoder_hidden_states": embeds,
        "timestep": t.expand(latents.shape[0]).clone(),  # no view of another tensor of the request
        "freqs_cis": batch.cond.freqs_cis,
    }


def size_of(batch: Req) -> tuple[int, int]:
    """Return (height, width) in pixels."""
    assert batch.params.height is not None and batch.params.width is not None
    return batch.params.height, batch.params.width
