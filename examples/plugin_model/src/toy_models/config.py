"""The toy models' conventions, as callbacks for the shared stages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from safelight.core.config import ComponentConfigs, PipelineConfig, PromptSpec, embeds_of, latent_statistics, texts_of
from safelight.core.request import Latents, Req
from safelight.core.schema import ModelTaskType
from safelight.layers.packing import PATCH_SIZE, pack_latents, unpack_latents
from safelight.layers.pixels import image_to_tensor
from safelight.layers.rotary import rotary_table
from safelight.stages.schedule import linear_sigmas
from toy_models.transformer import ToyArchitecture


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
    architecture: ClassVar[type[Any]] = ToyArchitecture

    axes_dims: tuple[int, int]
    text_length: int

    @classmethod
    def fields_of(cls, configs: ComponentConfigs) -> dict[str, Any]:
        """Return the values of the fields, from the components' JSON."""
        half = configs["transformer"]["attention_head_dim"] // 2
        return {
            **latent_statistics(configs["vae"]),
            "vae_scale_factor": 2 ** (len(configs["vae"]["block_out_channels"]) - 1),
            "latent_channels": configs["vae"]["latent_channels"],
            "axes_dims": (half, half),
            "text_length": configs["tokenizer"]["model_max_length"],
        }

    @property
    def size_multiple(self) -> int:
        """Pixels along one side of a token."""
        return self.vae_scale_factor * PATCH_SIZE

    def encode_prompt_spec(self, index: int, batch: Req) -> PromptSpec:
        """Return how CLIP takes the text."""
        return PromptSpec(*texts_of(batch), self.text_length, "last_hidden_state")

    def prepare_latent_shape(self, batch: Req) -> tuple[int, ...]:
        """Return [1, C, H, W] in latent pixels."""
        return (1, self.latent_channels, *self.latent_size(batch))

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

    def transformer_kwargs(self, branch: str, batch: Req, latent_model_input: Latents, t: Tensor) -> dict[str, Tensor]:
        """Return the arguments of a branch's call: all but those in `shared_kwargs` have a batch dimension."""
        assert isinstance(latent_model_input, Tensor)
        return {
            "hidden_states": latent_model_input,
            "encoder_hidden_states": embeds_of(branch, batch)[0],
            "timestep": t.expand(latent_model_input.shape[0]).clone(),  # no view of another tensor of the request
            "freqs_cis": batch.cond.freqs_cis,
        }


@dataclass(frozen=True, kw_only=True)
class ToyVariationPipelineConfig(ToyPipelineConfig):
    """Conventions of `ToyVariationPipeline`: those of `ToyPipeline`, and how the image goes into the VAE."""

    task: ClassVar[ModelTaskType] = ModelTaskType.TI2I
    num_input_images: ClassVar[tuple[int, int]] = (1, 1)

    def prepare_vae_input(self, batch: Req, index: int) -> Tensor:
        """Return the image at the size that is made, [1, 3, H, W]."""
        assert batch.params.image is not None
        return image_to_tensor(batch.params.image[index], *self.output_size(batch))
