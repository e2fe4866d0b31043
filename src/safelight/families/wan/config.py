"""Wan's conventions, as callbacks for the shared stages."""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import ftfy
import torch
from PIL import Image
from torch import Tensor

from safelight.core.config import (
    ComponentConfigs,
    PipelineConfig,
    PromptSpec,
    check_field,
    embeds_of,
    latent_statistics,
    params_of,
    texts_of,
)
from safelight.core.request import Latents, Req
from safelight.core.schema import ModelTaskType
from safelight.errors import ModelIndexError
from safelight.families.wan.params import (
    LAST_IMAGE,
    NEEDS_LAST_IMAGE,
    TWO_STAGES,
    WanDMDSamplingParams,
    WanImageToVideoSamplingParams,
    WanSamplingParams,
)
from safelight.families.wan.transformer import WanArchitecture
from safelight.layers.pixels import image_to_tensor
from safelight.layers.rotary import rotary_table
from safelight.stages.schedule import shifted_sigmas

TRANSFORMERS = ("transformer", "transformer_2")
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
    """Conventions of `WanPipeline`: text to video.

    Attributes:
        temporal_scale_factor: frames a latent frame, but for the first.
        patch_size: frames, rows and columns of latent pixels that are one token.
        axes_dims_rope: channels of a head that turn with frame, row and column.
        boundary_timestep: from here up `transformer` runs a step and below `transformer_2`; None is one for all.

    """

    task: ClassVar[ModelTaskType] = ModelTaskType.T2V
    precisions: ClassVar[Mapping[str, str]] = {"vae": "float32", "image_encoder": "float32"}
    shared_kwargs: ClassVar[frozenset[str]] = frozenset({"freqs_cis"})
    latent_dtype: ClassVar[torch.dtype | None] = torch.float32
    architecture: ClassVar[type[Any]] = WanArchitecture

    temporal_scale_factor: int
    patch_size: tuple[int, int, int]
    axes_dims_rope: tuple[int, int, int]
    boundary_timestep: float | None

    @classmethod
    def variant_of(cls, configs: ComponentConfigs) -> type[PipelineConfig]:
        """Return the class to build: one of its own where tokens have timesteps of their own."""
        return WanFirstFramePipelineConfig if expands_timesteps(configs) else cls

    @classmethod
    def fields_of(cls, configs: ComponentConfigs) -> dict[str, Any]:
        """Return the values of the fields."""
        vae, boundary_ratio = configs["vae"], configs["model_index"].get("boundary_ratio")
        transformer = next(iter(transformers_of(configs).values()))
        head_dim = transformer["attention_head_dim"]
        side_dim = 2 * (head_dim // 6)
        return {
            **latent_statistics(vae),
            "vae_scale_factor": vae.get("scale_factor_spatial", 8),
            "latent_channels": vae.get("z_dim", 16),
            "temporal_scale_factor": vae.get("scale_factor_temporal", 4),
            "patch_size": tuple(transformer["patch_size"]),
            "axes_dims_rope": (head_dim - 2 * side_dim, side_dim, side_dim),
            "boundary_timestep": None if boundary_ratio is None else boundary_ratio * NUM_TRAIN_TIMESTEPS,
        }

    @classmethod
    def check_components(cls, configs: ComponentConfigs) -> None:
        """Refuse a transformer that is null and steps would ask for, and components that do not fit each other."""
        boundary_ratio = configs["model_index"].get("boundary_ratio")
        for name in needed_transformers(boundary_ratio):
            if name not in configs:
                raise ModelIndexError(f"model_index.json: {name} is null, and boundary_ratio {boundary_ratio} needs it")
        transformers, width = transformers_of(configs), configs["text_encoder"].get("d_model")
        first = next(iter(transformers.values()))
        for name, transformer in transformers.items():
            given, made = transformer["in_channels"], transformer["out_channels"]
            check_field(name, "in_channels", given, (cls.in_channels(configs["vae"]),))
            check_field(name, "out_channels", made or given, (configs["vae"].get("z_dim", 16),))
            frames, rows, columns = transformer["patch_size"]
            check_field(name, "patch_size, of frames", frames, (1,))
            check_field(name, "patch_size, of columns", columns, (rows,))
            if width is not None:
                check_field(name, "text_dim", transformer["text_dim"], (width,))
            for field in SHARED_BY_STAGES:
                check_field(name, field, transformer[field], (first[field],))

    @classmethod
    def in_channels(cls, vae: Mapping[str, Any]) -> int:
        """Return the channels of a transformer's input: of the latents alone."""
        channels: int = vae.get("z_dim", 16)
        return channels

    def own_defaults(self) -> dict[str, Any]:
        """Return the frames a second of the model whose VAE shrinks sixteenfold."""
        return {"fps": TI2V_FPS} if self.vae_scale_factor == 16 else {}

    @property
    def size_multiple(self) -> int:
        """Pixels along one side of a token."""
        return self.vae_scale_factor * self.patch_size[1]

    @property
    def frame_step(self) -> int:
        """Frames a latent frame, but for the first."""
        return self.temporal_scale_factor

    def capabilities(self) -> frozenset[str]:
        """Return what the components allow, in the words of the parameters."""
        return frozenset(() if self.boundary_timestep is None else (TWO_STAGES,))

    def encode_prompt_spec(self, index: int, batch: Req) -> PromptSpec:
        """Return how UMT5 takes the text: padded, and zero where it is padding."""
        length = params_of(batch, WanSamplingParams).max_sequence_length
        assert length is not None
        prompt, negative = map(cleaned, texts_of(batch))
        return PromptSpec(prompt, negative, length, "last_hidden_state", attention_mask=True, zero_padding=True)

    def prepare_latent_shape(self, batch: Req) -> tuple[int, ...]:
        """Return [1, C, T, H, W] in latent frames and pixels."""
        assert batch.params.num_frames is not None
        num_frames = (batch.params.num_frames - 1) // self.temporal_scale_factor + 1
        return (1, self.latent_channels, num_frames, *self.latent_size(batch))

    def prepare_cond(self, batch: Req, device: torch.device, dtype: torch.dtype) -> WanCond:
        """Return the rotary table; every token is noisy."""
        return WanCond(self.get_freqs_cis(batch, device), torch.ones(1, 1, device=device))

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
        low_noise = params_of(batch, WanSamplingParams).guidance_scale_2
        return batch.params.cfg_scale() if low_noise is None or self.runs_high_noise(t) else low_noise

    def transformer_kwargs(self, branch: str, batch: Req, latent_model_input: Latents, t: Tensor) -> dict[str, Tensor]:
        """Return the transformer's arguments."""
        assert isinstance(latent_model_input, Tensor)
        cond: WanCond = batch.cond
        kwargs = {
            "hidden_states": self.with_condition(latent_model_input, cond),
            "timestep": cond.noisy * t,
            "encoder_hidden_states": embeds_of(branch, batch)[0],
            "freqs_cis": cond.freqs_cis,
        }
        return kwargs if cond.image_embeds is None else {**kwargs, "encoder_hidden_states_image": cond.image_embeds}

    def with_condition(self, latents: Tensor, cond: WanCond) -> Tensor:
        """Return the latents with what is given of the images."""
        return latents


@dataclass(frozen=True, kw_only=True)
class WanFirstFramePipelineConfig(WanPipelineConfig):
    """Conventions of TI2V-5B: tokens have timesteps of their own, and the first frame may be given."""

    task: ClassVar[ModelTaskType] = ModelTaskType.TI2V
    num_input_images: ClassVar[tuple[int, int]] = (0, 1)

    @classmethod
    def check_components(cls, configs: ComponentConfigs) -> None:
        """Refuse components that do not fit each other, and tokens of another size than the reference counts."""
        super().check_components(configs)
        for name, transformer in transformers_of(configs).items():
            check_field(name, "patch_size, of rows", transformer["patch_size"][1], (WanArchitecture.patch_size[1],))

    def prepare_vae_input(self, batch: Req, index: int) -> Tensor:
        """Return [1, 3, 1, H, W]: the first frame."""
        assert batch.params.image is not None
        return image_to_tensor(batch.params.image[0], *self.output_size(batch))[:, :, None]

    def prepare_cond(self, batch: Req, device: torch.device, dtype: torch.dtype) -> WanCond:
        """Return the rotary table, and the first frame where it is given; every other token is noisy."""
        if not batch.image_latents:
            return super().prepare_cond(batch, device, dtype)
        noisy = torch.ones(1, batch.raw_latent_shape[2], device=device)
        noisy[:, 0] = 0
        return WanCond(self.get_freqs_cis(batch, device), noisy, batch.image_latents[0])

    def with_condition(self, latents: Tensor, cond: WanCond) -> Tensor:
        """Return the latents, with the first frame in its place where it is given."""
        return latents if cond.condition is None else torch.cat((cond.condition, latents[:, :, 1:]), dim=2)

    def post_denoising_loop(self, latents: Latents, batch: Req) -> Tensor:
        """Put the first frame in its place, where it is given."""
        assert isinstance(latents, Tensor)
        return self.with_condition(latents, batch.cond)

    def latent_output(self, latents: tuple[Tensor, ...], batch: Req) -> tuple[Tensor, ...]:
        """Return the latents with the given first frame in its place."""
        return (self.post_denoising_loop(latents[0], batch),)


@dataclass(frozen=True, kw_only=True)
class WanGivenFramePipelineConfig(WanFirstFramePipelineConfig):
    """Conventions of `WanImageToVideoPipeline` with TI2V-5B: the first frame is given."""

    num_input_images: ClassVar[tuple[int, int]] = (1, 1)


@dataclass(frozen=True, kw_only=True)
class WanImageToVideoPipelineConfig(WanPipelineConfig):
    """Conventions of `WanImageToVideoPipeline`: the video begins with a given image, and may end with one.

    Attributes:
        takes_image_embeds: whether the transformer is given the embeddings of images.
        needs_last_image: whether these are of a first and a last image.

    """

    task: ClassVar[ModelTaskType] = ModelTaskType.TI2V
    num_input_images: ClassVar[tuple[int, int]] = (1, 1)
    """A last one has a field of its own."""

    takes_image_embeds: bool
    needs_last_image: bool

    @classmethod
    def variant_of(cls, configs: ComponentConfigs) -> type[PipelineConfig]:
        """Return the class that has the model's conventions."""
        return WanGivenFramePipelineConfig if expands_timesteps(configs) else cls

    @classmethod
    def fields_of(cls, configs: ComponentConfigs) -> dict[str, Any]:
        """Return the values of the fields."""
        transformer = configs.get("transformer", {})
        takes_embeds = transformer.get("image_dim") is not None
        return {
            **super().fields_of(configs),
            "takes_image_embeds": takes_embeds,
            "needs_last_image": takes_embeds and transformer["pos_embed_seq_len"] is not None,
        }

    @classmethod
    def check_components(cls, configs: ComponentConfigs) -> None:
        """Refuse components that do not fit each other, and a transformer of embedded images without their encoder."""
        super().check_components(configs)
        image_dim = configs.get("transformer", {}).get("image_dim")
        if image_dim is None:
            return
        for name in ("image_encoder", "image_processor"):
            if name not in configs:
                raise ModelIndexError(f"model_index.json: {name} is null, and the transformer's image_dim needs it")
        width = configs["image_encoder"].get("hidden_size", image_dim)
        check_field("transformer", "image_dim", image_dim, (width,))

    @classmethod
    def in_channels(cls, vae: Mapping[str, Any]) -> int:
        """Return the channels of a transformer's input: of the latents, and beside them of the image's and its mask."""
        mask: int = vae.get("scale_factor_temporal", 4)
        return 2 * super().in_channels(vae) + mask

    def capabilities(self) -> frozenset[str]:
        """Return what the components allow, in the words of the parameters."""
        last = {NEEDS_LAST_IMAGE, LAST_IMAGE} if self.needs_last_image else {LAST_IMAGE}
        return super().capabilities() | (last if self.needs_last_image or not self.takes_image_embeds else set())

    def images_to_embed(self, batch: Req) -> list[Image.Image]:
        """Return the first and the last image, where the transformer takes embeddings of them."""
        return list(images_of(batch)) if self.takes_image_embeds else []

    def num_vae_inputs(self, batch: Req) -> int:
        """All images are in one clip."""
        return 1

    def prepare_vae_input(self, batch: Req, index: int) -> Tensor:
        """Return [1, 3, T, H, W]: the first image, nothing, and the last."""
        assert batch.params.num_frames is not None
        first, *last = (image_to_tensor(image, *self.output_size(batch)) for image in images_of(batch))
        nothing = torch.zeros_like(first)
        return torch.stack((first, *[nothing] * (batch.params.num_frames - 1 - len(last)), *last), dim=2)

    def prepare_cond(self, batch: Req, device: torch.device, dtype: torch.dtype) -> WanCond:
        """Return the rotary table and what is given of the images."""
        freqs_cis, (clip,) = self.get_freqs_cis(batch, device), batch.image_latents
        given = torch.zeros(1, self.temporal_scale_factor, *batch.raw_latent_shape[2:], device=device)
        given[:, :, 0] = 1
        if len(images_of(batch)) > 1:
            given[:, -1, -1] = 1
        embeds = None if batch.image_embeds is None else torch.cat(tuple(batch.image_embeds))[None]
        condition = torch.cat((given, clip), dim=1)
        return WanCond(freqs_cis, torch.ones(1, 1, device=device), condition, embeds)

    def with_condition(self, latents: Tensor, cond: WanCond) -> Tensor:
        """Return the latents beside the images'."""
        assert cond.condition is not None
        return torch.cat((latents, cond.condition), dim=1)


@dataclass(frozen=True, kw_only=True)
class WanDMDPipelineConfig(WanPipelineConfig):
    """Conventions of `WanDMDPipeline`: few given timesteps, text alone, and no guidance.

    Attributes:
        timesteps: those that the model was distilled to.
        flow_shift: of the schedule that it was distilled on.

    """

    timesteps: tuple[float, ...]
    flow_shift: float

    @classmethod
    def variant_of(cls, configs: ComponentConfigs) -> type[PipelineConfig]:
        """Return this class: without a given frame, all tokens have the same timestep."""
        return cls

    @classmethod
    def fields_of(cls, configs: ComponentConfigs) -> dict[str, Any]:
        """Return the values of the fields."""
        index = configs["model_index"]
        return {
            **super().fields_of(configs),
            "timesteps": tuple(index.get("dmd_denoising_steps", FAST_TIMESTEPS)),
            "flow_shift": index.get("flow_shift", FAST_FLOW_SHIFT),
        }

    def own_defaults(self) -> dict[str, Any]:
        """Return the timesteps that the model was distilled to, among others."""
        return {**super().own_defaults(), "timesteps": self.timesteps}

    def prepare_timesteps(self, batch: Req) -> list[float] | None:
        """Return the timesteps asked for."""
        return list(params_of(batch, WanDMDSamplingParams).timesteps or ())

    def prepare_sigmas(self, batch: Req) -> list[float] | None:
        """Return the noise levels of the training schedule that are nearest to the timesteps."""
        return shifted_sigmas(self.prepare_timesteps(batch) or [], self.flow_shift, NUM_TRAIN_TIMESTEPS)


def transformers_of(configs: ComponentConfigs) -> ComponentConfigs:
    """Return the JSON of the transformers that there are, by name."""
    return {name: configs[name] for name in TRANSFORMERS if name in configs}


def expands_timesteps(configs: ComponentConfigs) -> bool:
    """Say whether tokens have timesteps of their own."""
    expands: bool = configs["model_index"].get("expand_timesteps", False)
    return expands


def images_of(batch: Req) -> tuple[Image.Image, ...]:
    """Return the first image, and the last where there is one."""
    params = params_of(batch, WanImageToVideoSamplingParams)
    assert params.image is not None
    return params.image if params.last_image is None else (*params.image, params.last_image)


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
