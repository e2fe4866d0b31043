"""Wan's conventions, as callbacks for the shared stages."""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import ftfy
import torch
from PIL import Image
from torch import Tensor

from safelight.core.config import PipelineConfig, PromptSpec, check_field
from safelight.core.params import SamplingParams
from safelight.core.request import Latents, Req
from safelight.core.schema import ModelSchema, ModelTaskType
from safelight.errors import ModelIndexError
from safelight.families.wan.params import (
    LAST_IMAGE,
    NEEDS_LAST_IMAGE,
    TWO_STAGES,
    WanDMDSamplingParams,
    WanImageToVideoSamplingParams,
    WanSamplingParams,
)
from safelight.layers.pixels import image_to_tensor
from safelight.layers.rotary import rotary_table
from safelight.stages.schedule import shifted_sigmas

TRANSFORMERS = ("transformer", "transformer_2")
PATCH_SIZE = (1, 2, 2)
SHARED_BY_STAGES = ("attention_head_dim", "image_dim", "patch_size", "pos_embed_seq_len")
"""Fields in which two transformers agree, because a request's tables and images are made once for both."""
NUM_TRAIN_TIMESTEPS = 1000
FAST_TIMESTEPS = (1000.0, 757.0, 522.0)
"""FastWan's, where the index states none."""
FAST_FLOW_SHIFT = 8.0
TI2V_FPS = 24
"""Of the model whose VAE shrinks sixteenfold; the others have 16."""


@dataclass(frozen=True)
class WanCond:
    """What the transformer is given at every step besides latents and time.

    Attributes:
        freqs_cis: complex64 [S, D/2], rotary table.
        noisy: float32 [1, G], 1 for each group of tokens that is noisy and 0 for a given one: all, or latent frames.
        condition: float32 [1, C, T, H, W], beside the latents or, with one frame, in the place of their first; or None.
        image_embeds: [1, S_images, C], or None.

    """

    freqs_cis: Tensor
    noisy: Tensor
    condition: Tensor | None = None
    image_embeds: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class WanPipelineConfig(PipelineConfig):
    """Conventions of `WanPipeline`.

    Attributes:
        temporal_scale_factor: frames a latent frame, but for the first.
        patch_size: frames, rows and columns of latent pixels that are one token.
        axes_dims_rope: channels of a head that turn with frame, row and column.
        boundary_timestep: from here up `transformer` runs a step and below `transformer_2`; None is one for all.
        expand_timesteps: whether tokens have timesteps of their own (TI2V-5B).
        takes_image_embeds: whether the transformer is given the embeddings of images.
        needs_last_image: whether these are of a first and a last image.
        timesteps: those that the model was distilled to.
        flow_shift: of the schedule that it was distilled on.

    """

    task: ClassVar[ModelTaskType] = ModelTaskType.T2V
    precisions: ClassVar[Mapping[str, str]] = {"vae": "float32", "image_encoder": "float32"}
    shared_kwargs: ClassVar[frozenset[str]] = frozenset({"freqs_cis"})
    latent_dtype: ClassVar[torch.dtype | None] = torch.float32

    temporal_scale_factor: int
    patch_size: tuple[int, int, int]
    axes_dims_rope: tuple[int, int, int]
    boundary_timestep: float | None
    expand_timesteps: bool
    takes_image_embeds: bool
    needs_last_image: bool
    timesteps: tuple[float, ...]
    flow_shift: float

    @classmethod
    def from_model(cls, component_configs: Mapping[str, Mapping[str, Any]]) -> Self:
        """Build from the components' JSON.

        Raises:
            ModelIndexError: if a transformer that steps would ask for is null, or components do not fit each other.

        """
        index, vae = component_configs["model_index"], component_configs["vae"]
        boundary_ratio = index.get("boundary_ratio")
        for name in needed_transformers(boundary_ratio):
            if name not in component_configs:
                raise ModelIndexError(f"model_index.json: {name} is null, and boundary_ratio {boundary_ratio} needs it")
        transformer = component_configs.get("transformer") or component_configs["transformer_2"]
        cls.check_components(component_configs)
        takes_image_embeds = component_configs.get("transformer", {}).get("image_dim") is not None
        head_dim = transformer.get("attention_head_dim", 128)
        side_dim = 2 * (head_dim // 6)
        return cls(
            vae_scale_factor=vae.get("scale_factor_spatial", 8),
            latent_channels=vae.get("z_dim", 16),
            vae_scale=tuple(1.0 / std for std in vae["latents_std"]),
            vae_shift=tuple(vae["latents_mean"]),
            temporal_scale_factor=vae.get("scale_factor_temporal", 4),
            patch_size=tuple(transformer.get("patch_size", PATCH_SIZE)),
            axes_dims_rope=(head_dim - 2 * side_dim, side_dim, side_dim),
            boundary_timestep=None if boundary_ratio is None else boundary_ratio * NUM_TRAIN_TIMESTEPS,
            expand_timesteps=index.get("expand_timesteps", False),
            takes_image_embeds=takes_image_embeds,
            needs_last_image=takes_image_embeds and transformer.get("pos_embed_seq_len") is not None,
            timesteps=tuple(index.get("dmd_denoising_steps", FAST_TIMESTEPS)),
            flow_shift=index.get("flow_shift", FAST_FLOW_SHIFT),
        )

    @classmethod
    def check_components(cls, component_configs: Mapping[str, Mapping[str, Any]]) -> None:
        """Refuse components that do not fit each other: a request would end where they meet."""
        vae, expand = component_configs["vae"], component_configs["model_index"].get("expand_timesteps", False)
        made = vae.get("z_dim", 16)
        present = {name: component_configs[name] for name in TRANSFORMERS if name in component_configs}
        for name, transformer in present.items():
            given = transformer.get("in_channels", 16)
            check_field(name, "in_channels", given, (cls.in_channels(vae, expand),))
            check_field(name, "out_channels", transformer.get("out_channels", 16) or given, (made,))
            frames, rows, columns = transformer.get("patch_size", PATCH_SIZE)
            check_field(name, "patch_size, of frames", frames, (1,))
            check_field(name, "patch_size, of columns", columns, (rows,))
            if expand:  # where the reference counts timesteps by tokens of this size
                check_field(name, "patch_size, of rows", rows, (PATCH_SIZE[1],))
            width = component_configs["text_encoder"].get("d_model")
            if width is not None:
                check_field(name, "text_dim", transformer.get("text_dim", 4096), (width,))
            for field in SHARED_BY_STAGES:
                check_field(name, field, transformer.get(field), (next(iter(present.values())).get(field),))

    @classmethod
    def in_channels(cls, vae: Mapping[str, Any], expand_timesteps: bool) -> int:
        """Return the channels of a transformer's input: of the latents alone."""
        channels: int = vae.get("z_dim", 16)
        return channels

    def model_schema(
        self, model: str, pipeline_name: str, params_cls: type[SamplingParams], defaults: Mapping[str, Any]
    ) -> ModelSchema:
        """Say what the loaded model takes."""
        fps = {"fps": TI2V_FPS} if self.vae_scale_factor == 16 else {}
        return ModelSchema(
            model=model,
            pipeline_name=pipeline_name,
            task=ModelTaskType.TI2V if self.expand_timesteps else self.task,
            params_cls=params_cls,
            defaults={**params_cls.defaults, **fps, **self.own_defaults(), **defaults},
            size_multiple=self.vae_scale_factor * self.patch_size[1],
            num_input_images=self.num_input_images(),
            frame_step=self.temporal_scale_factor,
            capabilities=self.capabilities(),
        )

    def num_input_images(self) -> tuple[int, int]:
        """Return the least and the most images: a model whose frames have timesteps of their own may be given one."""
        return (0, 1) if self.expand_timesteps else (0, 0)

    def own_defaults(self) -> dict[str, Any]:
        """Return defaults that the index states."""
        return {}

    def capabilities(self) -> frozenset[str]:
        """Return what the components allow, in the words of the parameters."""
        return frozenset(() if self.boundary_timestep is None else (TWO_STAGES,))

    def encode_prompt_spec(self, index: int, batch: Req) -> PromptSpec:
        """Return how UMT5 takes the text: padded, and zero where it is padding."""
        params = params_of(batch)
        negative = params.negative_prompt or ""
        assert params.max_sequence_length is not None and isinstance(negative, str)
        texts = cleaned(params.prompts()[0]), cleaned(negative)
        length = params.max_sequence_length
        return PromptSpec(*texts, length, "last_hidden_state", attention_mask=True, zero_padding=True)

    def prepare_latent_shape(self, batch: Req) -> tuple[int, ...]:
        """Return [1, C, T, H, W] in latent frames and pixels."""
        params = params_of(batch)
        assert params.num_frames is not None and params.height is not None and params.width is not None
        num_frames = (params.num_frames - 1) // self.temporal_scale_factor + 1
        height, width = params.height // self.vae_scale_factor, params.width // self.vae_scale_factor
        return (1, self.latent_channels, num_frames, height, width)

    def prepare_sigmas(self, batch: Req) -> list[float] | None:
        """Leave the noise levels to the solver."""
        return None

    def prepare_vae_input(self, batch: Req, index: int) -> Tensor:
        """Return [1, 3, 1, H, W]: an image that is the first frame."""
        params = params_of(batch)
        assert params.height is not None and params.width is not None and params.image is not None
        return image_to_tensor(params.image[0], params.height, params.width)[:, :, None]

    def prepare_cond(self, batch: Req, device: torch.device, dtype: torch.dtype) -> WanCond:
        """Return the rotary table, and the first frame where it is given; every other token is noisy."""
        freqs_cis = self.get_freqs_cis(batch, device)
        if not batch.image_latents:
            return WanCond(freqs_cis, torch.ones(1, 1, device=device))
        noisy = torch.ones(1, batch.raw_latent_shape[2], device=device)
        noisy[:, 0] = 0
        return WanCond(freqs_cis, noisy, batch.image_latents[0])

    def get_freqs_cis(self, batch: Req, device: torch.device) -> Tensor:
        """Return the rotary table of the tokens of frames, rows and columns, in this order."""
        grid = [size // patch for size, patch in zip(batch.raw_latent_shape[2:], self.patch_size, strict=True)]
        positions = [torch.arange(size, device=device) for size in grid]
        return rotary_table(torch.cartesian_prod(*positions), self.axes_dims_rope)

    def runs_high_noise(self, t: Tensor) -> bool:
        """Say whether this step is one for `transformer`."""
        return self.boundary_timestep is None or float(t) >= self.boundary_timestep

    def select_component(self, batch: Req, t: Tensor) -> str:
        """Return the transformer for this noise."""
        return "transformer" if self.runs_high_noise(t) else "transformer_2"

    def guidance_scale(self, batch: Req, t: Tensor) -> float:
        """Return the scale of the transformer that runs this step."""
        params = params_of(batch)
        low_noise = params.guidance_scale if params.guidance_scale_2 is None else params.guidance_scale_2
        scale = params.guidance_scale if self.runs_high_noise(t) else low_noise
        assert scale is not None
        return scale

    def prepare_pos_cond_kwargs(self, batch: Req, latent_model_input: Latents, t: Tensor) -> dict[str, Tensor]:
        """Return the transformer's arguments with the prompt."""
        return self._transformer_kwargs(batch, batch.prompt_embeds[0], latent_model_input, t)

    def prepare_neg_cond_kwargs(self, batch: Req, latent_model_input: Latents, t: Tensor) -> dict[str, Tensor]:
        """Return the transformer's arguments with the negative prompt."""
        return self._transformer_kwargs(batch, batch.negative_prompt_embeds[0], latent_model_input, t)

    def _transformer_kwargs(self, batch: Req, embeds: Tensor, latents: Latents, t: Tensor) -> dict[str, Tensor]:
        assert isinstance(latents, Tensor)
        cond: WanCond = batch.cond
        kwargs = {
            "hidden_states": self.with_condition(latents, cond),
            "timestep": cond.noisy * t,
            "encoder_hidden_states": embeds,
            "freqs_cis": cond.freqs_cis,
        }
        return kwargs if cond.image_embeds is None else {**kwargs, "encoder_hidden_states_image": cond.image_embeds}

    def with_condition(self, latents: Tensor, cond: WanCond) -> Tensor:
        """Return the latents, with the first frame in its place where it is given."""
        return latents if cond.condition is None else torch.cat((cond.condition, latents[:, :, 1:]), dim=2)

    def post_denoising_loop(self, latents: Latents, batch: Req) -> Tensor:
        """Put the first frame in its place, where it is given."""
        assert isinstance(latents, Tensor)
        return self.with_condition(latents, batch.cond) if self.expand_timesteps else latents


@dataclass(frozen=True, kw_only=True)
class WanImageToVideoPipelineConfig(WanPipelineConfig):
    """Conventions of `WanImageToVideoPipeline`: the video begins with a given image, and may end with one."""

    task: ClassVar[ModelTaskType] = ModelTaskType.TI2V

    @classmethod
    def check_components(cls, component_configs: Mapping[str, Mapping[str, Any]]) -> None:
        """Refuse components that do not fit each other, and a transformer of embedded images without their encoder."""
        super().check_components(component_configs)
        image_dim = component_configs.get("transformer", {}).get("image_dim")
        if image_dim is None:
            return
        for name in ("image_encoder", "image_processor"):
            if name not in component_configs:
                raise ModelIndexError(f"model_index.json: {name} is null, and the transformer's image_dim needs it")
        width = component_configs["image_encoder"].get("hidden_size", image_dim)
        check_field("transformer", "image_dim", image_dim, (width,))

    @classmethod
    def in_channels(cls, vae: Mapping[str, Any], expand_timesteps: bool) -> int:
        """Return the channels of a transformer's input: of the latents, and beside them of the image's and its mask."""
        channels = super().in_channels(vae, expand_timesteps)
        mask: int = vae.get("scale_factor_temporal", 4)
        return channels if expand_timesteps else 2 * channels + mask

    def num_input_images(self) -> tuple[int, int]:
        """Return the least and the most images; a last one has a field of its own."""
        return (1, 1)

    def capabilities(self) -> frozenset[str]:
        """Return what the components allow, in the words of the parameters."""
        own = {NEEDS_LAST_IMAGE, LAST_IMAGE} if self.needs_last_image else {LAST_IMAGE}
        takes_last = self.needs_last_image or not (self.expand_timesteps or self.takes_image_embeds)
        return super().capabilities() | (own if takes_last else set())

    def images_to_embed(self, batch: Req) -> list[Image.Image]:
        """Return the first and the last image, where the transformer takes embeddings of them."""
        return list(self._images(batch)) if self.takes_image_embeds else []

    def num_vae_inputs(self, batch: Req) -> int:
        """All images are in one clip."""
        return 1

    def prepare_vae_input(self, batch: Req, index: int) -> Tensor:
        """Return [1, 3, T, H, W]: the first image, nothing, and the last; the first alone where it is a frame."""
        if self.expand_timesteps:
            return super().prepare_vae_input(batch, index)
        params = params_of(batch)
        assert params.num_frames is not None and params.height is not None and params.width is not None
        first, *last = (image_to_tensor(image, params.height, params.width) for image in self._images(batch))
        nothing = torch.zeros_like(first)
        return torch.stack((first, *[nothing] * (params.num_frames - 1 - len(last)), *last), dim=2)

    def prepare_cond(self, batch: Req, device: torch.device, dtype: torch.dtype) -> WanCond:
        """Return the rotary table and what is given of the images."""
        if self.expand_timesteps:
            return super().prepare_cond(batch, device, dtype)
        freqs_cis, (clip,) = self.get_freqs_cis(batch, device), batch.image_latents
        given = torch.zeros(1, self.temporal_scale_factor, *batch.raw_latent_shape[2:], device=device)
        given[:, :, 0] = 1
        if len(self._images(batch)) > 1:
            given[:, -1, -1] = 1
        embeds = None if batch.image_embeds is None else torch.cat(tuple(batch.image_embeds))[None]
        condition = torch.cat((given, clip), dim=1)
        return WanCond(freqs_cis, torch.ones(1, 1, device=device), condition, embeds)

    def with_condition(self, latents: Tensor, cond: WanCond) -> Tensor:
        """Return the latents beside the images', or with the image's as first frame."""
        if self.expand_timesteps:
            return super().with_condition(latents, cond)
        assert cond.condition is not None
        return torch.cat((latents, cond.condition), dim=1)

    def _images(self, batch: Req) -> tuple[Image.Image, ...]:
        params = batch.params
        assert isinstance(params, WanImageToVideoSamplingParams) and params.image is not None
        return params.image if params.last_image is None else (*params.image, params.last_image)


@dataclass(frozen=True, kw_only=True)
class WanDMDPipelineConfig(WanPipelineConfig):
    """Conventions of `WanDMDPipeline`: few given timesteps, and no guidance."""

    def num_input_images(self) -> tuple[int, int]:
        """Text alone."""
        return (0, 0)

    def own_defaults(self) -> dict[str, Any]:
        """Return the timesteps that the model was distilled to."""
        return {"timesteps": self.timesteps}

    def prepare_timesteps(self, batch: Req) -> list[float] | None:
        """Return the timesteps asked for."""
        params = batch.params
        assert isinstance(params, WanDMDSamplingParams) and params.timesteps is not None
        return list(params.timesteps)

    def prepare_sigmas(self, batch: Req) -> list[float] | None:
        """Return the noise levels of the training schedule that are nearest to the timesteps."""
        return shifted_sigmas(self.prepare_timesteps(batch) or [], self.flow_shift, NUM_TRAIN_TIMESTEPS)


def needed_transformers(boundary_ratio: float | None) -> list[str]:
    """Name the transformers that some step asks for; timesteps are from 0 to 999."""
    if boundary_ratio is None:
        return ["transformer"]
    high, low = boundary_ratio < 1, boundary_ratio > 0
    return ["transformer"] * high + ["transformer_2"] * low


def cleaned(text: str) -> str:
    """Return a prompt as the model was trained on: mended by ftfy, without HTML entities, and with single spaces.

    ftfy makes plain letters of fullwidth ones and of ligatures, straight quotes of curly ones, and text of what was
    decoded wrongly; control codes go. Entities may be escaped doubly.
    """
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split())


def params_of(batch: Req) -> WanSamplingParams:
    """Return the request's parameters as this family's."""
    assert isinstance(batch.params, WanSamplingParams)
    return batch.params
