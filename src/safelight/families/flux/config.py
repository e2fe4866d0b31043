"""FLUX.1's conventions, as callbacks for the shared stages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from safelight.core.config import ComponentConfigs, PromptSpec, check_field, embeds_of, params_of, texts_of
from safelight.core.request import Latents, Prediction, Req
from safelight.core.schema import ModelTaskType
from safelight.families.flux.params import EMBEDDED_GUIDANCE, FluxKontextSamplingParams, FluxSamplingParams
from safelight.families.flux.transformer import FluxArchitecture
from safelight.layers.pixels import image_to_tensor
from safelight.layers.rotary import rotary_table
from safelight.stages.packed_latents import PackedLatentsConfig, unit_timestep

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
    axes = (
        torch.arange(start, end, dtype=torch.float32, device=device)
        for start, end in ((image, image + 1), (0, height), (0, width))
    )
    return torch.cartesian_prod(*axes)


@dataclass(frozen=True, kw_only=True)
class FluxPipelineConfig(PackedLatentsConfig):
    """Conventions of `FluxPipeline`.

    Attributes:
        guidance_embeds: whether the guidance scale is an input of the transformer.
        clip_length: tokens of the CLIP encoder.

    """

    task: ClassVar[ModelTaskType] = ModelTaskType.T2I
    shared_kwargs: ClassVar[frozenset[str]] = frozenset({"freqs_cis"})
    architecture: ClassVar[type[Any]] = FluxArchitecture
    leaves_flow_sigmas: ClassVar[bool] = True

    guidance_embeds: bool
    clip_length: int

    @classmethod
    def fields_of(cls, configs: ComponentConfigs) -> dict[str, Any]:
        """Return the fields' values."""
        return {
            **super().fields_of(configs),
            "vae_scale_factor": 2 ** (len(configs["vae"].get("block_out_channels", (64,))) - 1),
            "guidance_embeds": configs["transformer"]["guidance_embeds"],
            "clip_length": clip_length(configs),
        }

    @classmethod
    def check_components(cls, configs: ComponentConfigs) -> None:
        """Refuse components that do not fit each other: a request would end where they meet."""
        super().check_components(configs)
        clip, t5 = configs["text_encoder"], configs["text_encoder_2"]
        widths = (("joint_attention_dim", t5.get("d_model")), ("pooled_projection_dim", clip.get("hidden_size")))
        for name, width in widths:
            if width is not None:
                check_field("transformer", name, configs["transformer"][name], (width,))
        length, positions = clip_length(configs), clip.get("max_position_embeddings")
        if positions is not None and not 1 <= length <= positions:
            check_field("tokenizer", "model_max_length", length, (positions,))

    def capabilities(self) -> frozenset[str]:
        """Return what the components allow, in the words of the parameters."""
        return super().capabilities() | ({EMBEDDED_GUIDANCE} if self.guidance_embeds else set())

    def encode_prompt_spec(self, index: int, batch: Req) -> PromptSpec:
        """Return how CLIP (0), which is pooled, and T5 (1) take the text."""
        params, (prompt, negative) = params_of(batch, FluxSamplingParams), texts_of(batch)
        if index == 0:
            return PromptSpec(prompt, negative, self.clip_length, "pooler_output")
        assert params.max_sequence_length is not None
        second, negative_second = params.prompt_2 or prompt, params.negative_prompt_2 or negative
        return PromptSpec(second, negative_second, params.max_sequence_length, "last_hidden_state")

    def prepare_cond(self, batch: Req, device: torch.device, dtype: torch.dtype) -> FluxCond:
        """Return rotary table, guidance and input image."""
        guidance = torch.tensor([batch.params.guidance_scale], device=device) if self.guidance_embeds else None
        return FluxCond(self.get_freqs_cis(batch, device), guidance, self.image_tokens(batch, dtype))

    def get_freqs_cis(self, batch: Req, device: torch.device) -> Tensor:
        """Return the rotary table of text (all at the origin), picture and input image, in this order."""
        text_ids = torch.zeros(batch.prompt_embeds[1].shape[1], 3, device=device)
        image_ids = [position_ids(*grid, number, device) for number, grid in enumerate(self.token_grids(batch))]
        return rotary_table(torch.cat((text_ids, *image_ids)), self.axes_dims_rope)

    def transformer_kwargs(self, branch: str, batch: Req, latent_model_input: Latents, t: Tensor) -> dict[str, Tensor]:
        """Return the transformer's arguments."""
        assert isinstance(latent_model_input, Tensor)
        cond: FluxCond = batch.cond
        tokens, (pooled, text) = latent_model_input, embeds_of(branch, batch)
        kwargs = {
            "hidden_states": tokens if cond.image_tokens is None else torch.cat((tokens, cond.image_tokens), dim=1),
            "encoder_hidden_states": text,
            "pooled_projections": pooled,
            "timestep": unit_timestep(t, tokens),
            "freqs_cis": cond.freqs_cis,
        }
        return kwargs if cond.guidance is None else {**kwargs, "guidance": cond.guidance}


def clip_length(configs: ComponentConfigs) -> int:
    """Return the tokens that CLIP's texts are filled up to."""
    length: int = configs["tokenizer"].get("model_max_length", 77)
    return length


@dataclass(frozen=True, kw_only=True)
class FluxKontextPipelineConfig(FluxPipelineConfig):
    """Conventions of `FluxKontextPipeline`: the input image's tokens follow the picture's."""

    task: ClassVar[ModelTaskType] = ModelTaskType.TI2I
    num_input_images: ClassVar[tuple[int, int]] = (0, 1)
    leaves_flow_sigmas: ClassVar[bool] = False

    def prepare_vae_input(self, batch: Req, index: int) -> Tensor:
        """Return the input image, [1, 3, H, W], at the trained size of the nearest aspect or about its own size."""
        params, multiple = params_of(batch, FluxKontextSamplingParams), self.size_multiple
        assert params.image is not None
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
