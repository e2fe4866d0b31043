"""Qwen-Image's conventions, as callbacks for the shared stages."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from safelight.core.config import PipelineConfig, PromptSpec, check_field, check_rotary
from safelight.core.params import SamplingParams
from safelight.core.request import Latents, Prediction, Req
from safelight.core.schema import ModelSchema, ModelTaskType
from safelight.families.qwen_image.params import (
    MAX_INPUT_IMAGES,
    TERMINAL_SHIFT,
    QwenImageEditSamplingParams,
    QwenImageLayeredSamplingParams,
    QwenImageSamplingParams,
)
from safelight.families.qwen_image.prompts import (
    EDIT_TEMPLATE,
    GENERATION_TEMPLATE,
    IMAGE_PAD,
    IMAGE_PLACE,
    NUMBERED_IMAGE_PLACE,
    PromptTemplate,
)
from safelight.layers.packing import PATCH_SIZE, pack_latents, unpack_latents
from safelight.layers.pixels import image_to_tensor
from safelight.layers.rotary import rotary_table
from safelight.stages.schedule import check_takes_sigmas, linear_mu, linear_sigmas

DEFAULT_SAMPLE_SIZE = 128
"""Latent pixels along one side of a picture, unless asked otherwise."""
MAX_TEXT_TOKENS = 1024
"""Of a prompt that goes without images, its template not counted."""
UNCUT = 1_000_000
"""Tokens, more than any prompt has: of texts that the reference does not cut."""
LAYERED_BASE_TOKENS = 256
"""Image tokens at which the layered model's schedule is shifted by 1: those of 256x256 pixels."""


@dataclass(frozen=True)
class QwenImageCond:
    """What the transformer is given at every step besides latents and time.

    Attributes:
        freqs_cis: complex64 [S_text + S_image, D/2], rotary table.
        negative_freqs_cis: the same with the negative prompt's tokens; None without one.
        image_tokens: [1, S, C], the input images' packed latents; None without.
        additional_t_cond: int64 [1], which learned vector joins the timestep's embedding; None without.

    """

    freqs_cis: Tensor
    negative_freqs_cis: Tensor | None
    image_tokens: Tensor | None
    additional_t_cond: Tensor | None


@dataclass(frozen=True, kw_only=True)
class QwenImagePipelineConfig(PipelineConfig):
    """Conventions of `QwenImagePipeline`.

    Attributes:
        axes_dims_rope: channels of a head that turn with image number, row and column.
        use_layer3d_rope: whether images are numbered as layers: the input image, which is the last, has -1.
        use_additional_t_cond: whether the timestep's embedding is joined by a learned vector.
        shift_terminal: noise level that the solver stretches its schedule to end at; None where it does not.

    """

    task: ClassVar[ModelTaskType] = ModelTaskType.T2I
    shared_kwargs: ClassVar[frozenset[str]] = frozenset({"freqs_cis"})
    template: ClassVar[PromptTemplate] = GENERATION_TEMPLATE
    num_input_images: ClassVar[tuple[int, int]] = (0, 0)
    switches: ClassVar[Mapping[str, tuple[bool, ...]]] = {"use_additional_t_cond": (False,)}
    """Of the transformer, what this pipeline takes: no learned vector is asked for here."""

    axes_dims_rope: tuple[int, ...]
    use_layer3d_rope: bool
    use_additional_t_cond: bool
    shift_terminal: float | None

    @classmethod
    def from_model(cls, component_configs: Mapping[str, Mapping[str, Any]]) -> Self:
        """Build from the components' JSON.

        Raises:
            ModelIndexError: if the components do not fit each other.

        """
        transformer, vae = component_configs["transformer"], component_configs["vae"]
        check_takes_sigmas(component_configs)
        check_components(component_configs)
        for name, allowed in cls.switches.items():
            check_field("transformer", name, transformer.get(name, False), allowed)
        return cls(
            vae_scale_factor=2 ** len(vae["temperal_downsample"]),
            latent_channels=transformer.get("in_channels", 64) // PATCH_SIZE**2,
            vae_scale=tuple(1.0 / std for std in vae["latents_std"]),
            vae_shift=tuple(vae["latents_mean"]),
            axes_dims_rope=tuple(transformer.get("axes_dims_rope", (16, 56, 56))),
            use_layer3d_rope=transformer.get("use_layer3d_rope", False),
            use_additional_t_cond=transformer.get("use_additional_t_cond", False),
            shift_terminal=component_configs["scheduler"].get("shift_terminal"),
        )

    def model_schema(
        self, model: str, pipeline_name: str, params_cls: type[SamplingParams], defaults: Mapping[str, Any]
    ) -> ModelSchema:
        """Say what the loaded model takes."""
        return ModelSchema(
            model=model,
            pipeline_name=pipeline_name,
            task=self.task,
            params_cls=params_cls,
            defaults={**params_cls.defaults, **self.default_size(), **defaults},
            size_multiple=self.vae_scale_factor * PATCH_SIZE,
            num_input_images=self.num_input_images,
            capabilities=frozenset({TERMINAL_SHIFT} if self.shift_terminal else ()),
        )

    def default_size(self) -> dict[str, int]:
        """Return height and width, where they do not depend on the request."""
        side = DEFAULT_SAMPLE_SIZE * self.vae_scale_factor
        return {"height": side, "width": side}

    def encode_prompt_spec(self, index: int, batch: Req) -> PromptSpec:
        """Return how the text encoder takes the text: in its template, which is dropped again, and cut."""
        params = params_of(batch)
        prefix = self.template.num_prefix_tokens
        return PromptSpec(
            prompt=self.template.text.format(params.prompts()[0]),
            negative_prompt=self.template.text.format(negative_prompt_of(params)),
            max_length=MAX_TEXT_TOKENS + prefix,
            output="last_hidden_state",
            padding="do_not_pad",
            drop_prefix=prefix,
            max_embeds=params.max_sequence_length,
        )

    def output_size(self, batch: Req) -> tuple[int, int]:
        """Return the (height, width) in pixels that is made."""
        params = params_of(batch)
        assert params.height is not None and params.width is not None
        return params.height, params.width

    def prepare_latent_shape(self, batch: Req) -> tuple[int, ...]:
        """Return [1, C, 1, H, W] in latent pixels."""
        height, width = self.output_size(batch)
        return (1, self.latent_channels, 1, height // self.vae_scale_factor, width // self.vae_scale_factor)

    def maybe_pack_latents(self, latents: Tensor, batch: Req) -> Latents:
        """Return [1, S, 4C]."""
        return pack_latents(latents.squeeze(2))

    def post_denoising_loop(self, latents: Latents, batch: Req) -> Tensor:
        """Return [1, C, 1, H, W] of packed latents."""
        assert isinstance(latents, Tensor)
        return unpack_latents(latents, *batch.raw_latent_shape[-2:])[:, :, None]

    def prepare_sigmas(self, batch: Req) -> list[float] | None:
        """Return the noise levels asked for, or evenly spaced ones from 1 to 1/steps."""
        params = params_of(batch)
        if params.sigmas is not None:
            return list(params.sigmas)
        assert params.num_inference_steps is not None
        return linear_sigmas(params.num_inference_steps)

    def prepare_mu(self, batch: Req, scheduler_config: Mapping[str, Any]) -> float | None:
        """Return the shift for this many tokens of the picture, on the line through the scheduler's two points."""
        height, width = self.prepare_latent_shape(batch)[-2:]
        return linear_mu(height // PATCH_SIZE * (width // PATCH_SIZE), scheduler_config)

    def prepare_cond(self, batch: Req, device: torch.device, dtype: torch.dtype) -> QwenImageCond:
        """Return rotary tables and input images."""
        lengths = [embeds[0].shape[1] for embeds in (batch.prompt_embeds, batch.negative_prompt_embeds) if embeds]
        tables = [self.get_freqs_cis(batch, length, device) for length in lengths]
        tokens = [pack_latents(latents.squeeze(2)).to(dtype) for latents in batch.image_latents]
        return QwenImageCond(
            freqs_cis=tables[0],
            negative_freqs_cis=tables[1] if len(tables) > 1 else None,
            image_tokens=torch.cat(tokens, dim=1) if tokens else None,
            additional_t_cond=self.additional_t_cond(device),
        )

    def additional_t_cond(self, device: torch.device) -> Tensor | None:
        """Return which learned vector joins the timestep's embedding."""
        return None

    def get_freqs_cis(self, batch: Req, num_text_tokens: int, device: torch.device) -> Tensor:
        """Return the rotary table of text, picture and input images, in this order."""
        shapes = [*self.picture_shapes(batch), *(latents.shape for latents in batch.image_latents)]
        grids = [(shape[-2] // PATCH_SIZE, shape[-1] // PATCH_SIZE) for shape in shapes]
        numbers = list(range(len(grids)))
        first = max(max(grid) // 2 for grid in grids)
        if self.use_layer3d_rope:
            numbers[-1] = -1
            first = max(first, len(grids) - 1)
        text_ids = torch.arange(first, first + num_text_tokens, dtype=torch.float32, device=device)
        image_ids = [centred_ids(*grid, number, device) for grid, number in zip(grids, numbers, strict=True)]
        ids = torch.cat((text_ids[:, None].expand(-1, 3), *image_ids))
        return rotary_table(ids, self.axes_dims_rope, dtype=torch.float32)

    def picture_shapes(self, batch: Req) -> list[tuple[int, ...]]:
        """Return the shape [..., H, W] in latent pixels of each picture that is made."""
        return [batch.raw_latent_shape]

    def guidance_scale(self, batch: Req, t: Tensor) -> float:
        """Return `true_cfg_scale`."""
        scale = params_of(batch).true_cfg_scale
        assert scale is not None
        return scale

    def prepare_pos_cond_kwargs(self, batch: Req, latent_model_input: Latents, t: Tensor) -> dict[str, Tensor]:
        """Return the transformer's arguments with the prompt."""
        return self._transformer_kwargs(batch, batch.prompt_embeds, batch.cond.freqs_cis, latent_model_input, t)

    def prepare_neg_cond_kwargs(self, batch: Req, latent_model_input: Latents, t: Tensor) -> dict[str, Tensor]:
        """Return the transformer's arguments with the negative prompt."""
        freqs_cis = batch.cond.negative_freqs_cis
        return self._transformer_kwargs(batch, batch.negative_prompt_embeds, freqs_cis, latent_model_input, t)

    def _transformer_kwargs(
        self, batch: Req, embeds: list[Tensor], freqs_cis: Tensor, latent_model_input: Latents, t: Tensor
    ) -> dict[str, Tensor]:
        assert isinstance(latent_model_input, Tensor)
        cond: QwenImageCond = batch.cond
        kwargs = {
            "hidden_states": latent_model_input,
            "encoder_hidden_states": embeds[0],
            # Rounded to the latents' dtype before the division, as the reference does.
            "timestep": t.expand(latent_model_input.shape[0]).to(latent_model_input.dtype) / 1000,
            "freqs_cis": freqs_cis,
            "condition_hidden_states": cond.image_tokens,
            "additional_t_cond": cond.additional_t_cond,
        }
        return {name: value for name, value in kwargs.items() if value is not None}

    def combine_guidance(self, batch: Req, predictions: Sequence[Prediction], t: Tensor) -> Prediction:
        """Join the branches, each token as long as the positive branch has it."""
        combined = super().combine_guidance(batch, predictions, t)
        if len(predictions) == 1:
            return combined
        positive = predictions[0]
        assert isinstance(positive, Tensor) and isinstance(combined, Tensor)
        lengths = [torch.norm(prediction, dim=-1, keepdim=True) for prediction in (positive, combined)]
        rescaled: Tensor = combined * (lengths[0] / lengths[1])
        return rescaled


@dataclass(frozen=True, kw_only=True)
class QwenImageEditPipelineConfig(QwenImagePipelineConfig):
    """Conventions of `QwenImageEditPipeline`: text encoder and VAE both see the input image."""

    task: ClassVar[ModelTaskType] = ModelTaskType.TI2I
    template: ClassVar[PromptTemplate] = EDIT_TEMPLATE
    num_input_images: ClassVar[tuple[int, int]] = (1, 1)

    def default_size(self) -> dict[str, int]:
        """Return nothing: height and width are those of the input image, fitted."""
        return {}

    def output_size(self, batch: Req) -> tuple[int, int]:
        """Return the (height, width) in pixels that is made."""
        return edit_params_of(batch).target_size()

    def encode_prompt_spec(self, index: int, batch: Req) -> PromptSpec:
        """Return how the text encoder takes the text after the places of the images; neither is cut."""
        params = edit_params_of(batch)
        places = self.image_places(len(params.input_images()))
        return PromptSpec(
            prompt=self.template.text.format(places + params.prompts()[0]),
            negative_prompt=self.template.text.format(places + negative_prompt_of(params)),
            max_length=UNCUT,
            output="last_hidden_state",
            padding="do_not_pad",
            drop_prefix=self.template.num_prefix_tokens,
        )

    def image_places(self, num_images: int) -> str:
        """Return the text that stands for the images."""
        return IMAGE_PLACE * num_images

    def text_encoder_inputs(
        self, spec: PromptSpec, text: str, batch: Req, tokenizer: Any, processor: Any
    ) -> dict[str, Tensor]:
        """Return token ids [1, S], and the places, pixels and grids of the images among them."""
        return vision_inputs(text, self.condition_images(batch), tokenizer, processor)

    def condition_images(self, batch: Req) -> list[Image.Image]:
        """Return the input images at the sizes at which the text encoder sees them."""
        params = edit_params_of(batch)
        return [
            image.resize(params.condition_size(image)[::-1], Image.Resampling.LANCZOS)
            for image in params.input_images()
        ]

    def prepare_vae_input(self, batch: Req, index: int) -> Tensor:
        """Return an input image, [1, C, 1, H, W]."""
        params = edit_params_of(batch)
        image = params.input_images()[index]
        return image_to_tensor(image, *params.vae_size(image))[:, :, None]


@dataclass(frozen=True, kw_only=True)
class QwenImageEditPlusPipelineConfig(QwenImageEditPipelineConfig):
    """Conventions of `QwenImageEditPlusPipeline`: several input images, numbered in the text."""

    num_input_images: ClassVar[tuple[int, int]] = (1, MAX_INPUT_IMAGES)

    def image_places(self, num_images: int) -> str:
        """Return the text that stands for the images."""
        return "".join(NUMBERED_IMAGE_PLACE.format(number) for number in range(1, num_images + 1))


@dataclass(frozen=True, kw_only=True)
class QwenImageLayeredPipelineConfig(QwenImageEditPipelineConfig):
    """Conventions of `QwenImageLayeredPipeline`: the composite and its layers are made together, in one sequence.

    The text encoder sees the input image only to write a caption of it.
    """

    template: ClassVar[PromptTemplate] = GENERATION_TEMPLATE
    switches: ClassVar[Mapping[str, tuple[bool, ...]]] = {"zero_cond_t": (False,)}
    """In the reference all layers but the composite would be steered as at time 0, which no model was trained for."""

    def encode_prompt_spec(self, index: int, batch: Req) -> PromptSpec:
        """Return how the text encoder takes the text alone."""
        spec = QwenImagePipelineConfig.encode_prompt_spec(self, index, batch)
        return dataclasses.replace(spec, max_length=UNCUT)

    def text_encoder_inputs(
        self, spec: PromptSpec, text: str, batch: Req, tokenizer: Any, processor: Any
    ) -> dict[str, Tensor]:
        """Return the token ids [1, S]."""
        return QwenImagePipelineConfig.text_encoder_inputs(self, spec, text, batch, tokenizer, processor)

    def caption_inputs(self, text: str, batch: Req, tokenizer: Any, processor: Any) -> dict[str, Tensor]:
        """Return what the text encoder is given to write a caption of the input image."""
        inputs = vision_inputs(text, self.condition_images(batch), tokenizer, processor)
        return {**inputs, "attention_mask": torch.ones_like(inputs["input_ids"])}

    def prepare_latent_shape(self, batch: Req) -> tuple[int, ...]:
        """Return [1, 1 + layers, C, H, W] in latent pixels: the composite, then its layers."""
        params = layered_params_of(batch)
        height, width = self.output_size(batch)
        assert params.layers is not None
        factor = self.vae_scale_factor
        return (1, 1 + params.layers, self.latent_channels, height // factor, width // factor)

    def maybe_pack_latents(self, latents: Tensor, batch: Req) -> Latents:
        """Return [1, (1 + layers) * S, 4C]."""
        return pack_latents(latents[0]).flatten(0, 1)[None]

    def post_denoising_loop(self, latents: Latents, batch: Req) -> Tensor:
        """Return the layers, [layers, C, 1, H, W], of packed latents; the composite is dropped."""
        assert isinstance(latents, Tensor)
        pictures = latents.view(batch.raw_latent_shape[1], -1, latents.shape[-1])
        return unpack_latents(pictures[1:], *batch.raw_latent_shape[-2:])[:, :, None]

    def prepare_sigmas(self, batch: Req) -> list[float] | None:
        """Return the noise levels asked for, or evenly spaced ones from 1."""
        params = params_of(batch)
        if params.sigmas is not None:
            return list(params.sigmas)
        assert params.num_inference_steps is not None
        spaced: list[float] = np.linspace(1.0, 0.0, params.num_inference_steps + 1)[:-1].tolist()
        return spaced

    def prepare_mu(self, batch: Req, scheduler_config: Mapping[str, Any]) -> float | None:
        """Return the shift for this many tokens of the input image."""
        height, width = batch.image_latents[0].shape[-2:]
        num_tokens = height // PATCH_SIZE * (width // PATCH_SIZE)
        return float((num_tokens / LAYERED_BASE_TOKENS) ** 0.5)

    def additional_t_cond(self, device: torch.device) -> Tensor | None:
        """Return the vector of pictures with transparency, which is the first."""
        return torch.zeros(1, dtype=torch.long, device=device) if self.use_additional_t_cond else None

    def picture_shapes(self, batch: Req) -> list[tuple[int, ...]]:
        """Return the shape [..., H, W] in latent pixels of the composite and each layer."""
        return [batch.raw_latent_shape] * batch.raw_latent_shape[1]

    def combine_guidance(self, batch: Req, predictions: Sequence[Prediction], t: Tensor) -> Prediction:
        """Join the branches, as long as the positive branch only if that is asked for."""
        if layered_params_of(batch).cfg_normalize:
            return super().combine_guidance(batch, predictions, t)
        return PipelineConfig.combine_guidance(self, batch, predictions, t)


def check_components(component_configs: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse components that do not fit each other: a request would end where they meet."""
    transformer, encoder = component_configs["transformer"], component_configs["text_encoder"]
    channels = transformer.get("in_channels", 64)
    check_field("transformer", "in_channels", channels, (component_configs["vae"].get("z_dim", 16) * PATCH_SIZE**2,))
    made = (transformer.get("out_channels", 16) or channels) * transformer.get("patch_size", 2) ** 2
    check_field("transformer", "out_channels, times patch_size squared", made, (channels,))
    head_dim = transformer.get("attention_head_dim", 128)
    check_rotary("transformer", transformer.get("axes_dims_rope", (16, 56, 56)), 3, head_dim)
    width = encoder.get("text_config", encoder).get("hidden_size")
    if width is not None:
        check_field("transformer", "joint_attention_dim", transformer.get("joint_attention_dim", 3584), (width,))


def centred_ids(height: int, width: int, number: int, device: torch.device) -> Tensor:
    """Return float32 [height * width, 3]: the image's number, and each token's row and column from the centre."""
    rows = torch.arange(height, dtype=torch.float32, device=device) - (height - height // 2)
    columns = torch.arange(width, dtype=torch.float32, device=device) - (width - width // 2)
    return torch.cartesian_prod(torch.tensor([float(number)], device=device), rows, columns)


def vision_inputs(text: str, images: Iterable[Image.Image], tokenizer: Any, processor: Any) -> dict[str, Tensor]:
    """Return token ids [1, S] with as many places for each image as it has merged patches, pixels [P, C], and grids.

    Beside them, int32 [1, S], 1 where a token is of an image: without, the encoder would count the tokens of an image
    like words, and not by row and column.
    """
    features = processor(images=list(images), return_tensors="pt")
    counts = (features.image_grid_thw.prod(dim=-1) // processor.merge_size**2).tolist()
    first, *others = text.split(IMAGE_PAD)
    expanded = first + "".join(IMAGE_PAD * count + other for count, other in zip(counts, others, strict=True))
    input_ids = tokenizer(expanded, return_tensors="pt").input_ids
    return {
        "input_ids": input_ids,
        "mm_token_type_ids": (input_ids == tokenizer.convert_tokens_to_ids(IMAGE_PAD)).int(),
        "pixel_values": features.pixel_values,
        "image_grid_thw": features.image_grid_thw,
    }


def params_of(batch: Req) -> QwenImageSamplingParams:
    """Return the request's parameters as this family's."""
    assert isinstance(batch.params, QwenImageSamplingParams)
    return batch.params


def edit_params_of(batch: Req) -> QwenImageEditSamplingParams:
    """Return the parameters of a request with input images."""
    assert isinstance(batch.params, QwenImageEditSamplingParams)
    return batch.params


def layered_params_of(batch: Req) -> QwenImageLayeredSamplingParams:
    """Return the parameters of a decomposition into layers."""
    assert isinstance(batch.params, QwenImageLayeredSamplingParams)
    return batch.params


def negative_prompt_of(params: QwenImageSamplingParams) -> str:
    """Return the negative prompt, empty if there is none."""
    assert not isinstance(params.negative_prompt, tuple)
    return params.negative_prompt or ""
