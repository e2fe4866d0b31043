"""Qwen-Image's conventions, as callbacks for the shared stages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from safelight.core.config import ComponentConfigs, PromptSpec, check_field, embeds_of, params_of, texts_of
from safelight.core.request import Latents, Prediction, Req
from safelight.core.schema import ModelTaskType
from safelight.families.qwen_image.params import (
    MAX_INPUT_IMAGES,
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
from safelight.families.qwen_image.transformer import QwenImageArchitecture
from safelight.layers.packing import PATCH_SIZE, pack_latents, unpack_latents
from safelight.layers.pixels import image_to_tensor
from safelight.layers.rotary import rotary_table
from safelight.stages.packed_latents import PackedLatentsConfig, unit_timestep

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
        freqs_cis: by branch, complex64 [S_text + S_image, D/2], rotary table.
        image_tokens: [1, S, C], the input images' packed latents; None without.
        additional_t_cond: int64 [1], which learned vector joins the timestep's embedding; None without.

    """

    freqs_cis: Mapping[str, Tensor]
    image_tokens: Tensor | None
    additional_t_cond: Tensor | None


@dataclass(frozen=True, kw_only=True)
class QwenImagePipelineConfig(PackedLatentsConfig):
    """Conventions of `QwenImagePipeline`. The VAE is one for videos, of which a picture is a single frame.

    Attributes:
        use_layer3d_rope: whether images are numbered as layers: the input image, which is the last, has -1.
        use_additional_t_cond: whether the timestep's embedding is joined by a learned vector.

    """

    task: ClassVar[ModelTaskType] = ModelTaskType.T2I
    shared_kwargs: ClassVar[frozenset[str]] = frozenset({"freqs_cis"})
    architecture: ClassVar[type[Any]] = QwenImageArchitecture
    template: ClassVar[PromptTemplate] = GENERATION_TEMPLATE
    max_text_tokens: ClassVar[int] = MAX_TEXT_TOKENS
    switches: ClassVar[Mapping[str, tuple[bool, ...]]] = {"use_additional_t_cond": (False,)}
    """Of the transformer, what this pipeline takes: no learned vector is asked for here."""

    use_layer3d_rope: bool
    use_additional_t_cond: bool

    @classmethod
    def fields_of(cls, configs: ComponentConfigs) -> dict[str, Any]:
        """Return the fields' values."""
        transformer = configs["transformer"]
        return {
            **super().fields_of(configs),
            "vae_scale_factor": 2 ** len(configs["vae"]["temperal_downsample"]),
            "use_layer3d_rope": transformer["use_layer3d_rope"],
            "use_additional_t_cond": transformer["use_additional_t_cond"],
        }

    @classmethod
    def check_components(cls, configs: ComponentConfigs) -> None:
        """Refuse components that do not fit each other: a request would end where they meet."""
        super().check_components(configs)
        transformer, encoder = configs["transformer"], configs["text_encoder"]
        width = encoder.get("text_config", encoder).get("hidden_size")
        if width is not None:
            check_field("transformer", "joint_attention_dim", transformer["joint_attention_dim"], (width,))
        for name, allowed in cls.switches.items():
            check_field("transformer", name, transformer[name], allowed)

    def encode_prompt_spec(self, index: int, batch: Req) -> PromptSpec:
        """Return how the text encoder takes the text: in its template, which is dropped again, and cut."""
        params, places = params_of(batch, QwenImageSamplingParams), self.image_places(batch)
        prompt, negative = (self.template.text.format(places + text) for text in texts_of(batch))
        return PromptSpec(
            prompt=prompt,
            negative_prompt=negative,
            max_length=self.max_text_tokens + self.template.num_prefix_tokens,
            output="last_hidden_state",
            padding="do_not_pad",
            drop_prefix=self.template.num_prefix_tokens,
            max_embeds=params.max_sequence_length if params.cuts_prompts else None,
        )

    def image_places(self, batch: Req) -> str:
        """Return the text before the prompt that stands for the images."""
        return ""

    def post_denoising_loop(self, latents: Latents, batch: Req) -> Tensor:
        """Return [1, C, 1, H, W] of packed latents."""
        return super().post_denoising_loop(latents, batch)[:, :, None]

    def prepare_cond(self, batch: Req, device: torch.device, dtype: torch.dtype) -> QwenImageCond:
        """Return rotary tables and input images."""
        lengths = {branch: embeds_of(branch, batch)[0].shape[1] for branch in self.branches(batch)}
        tables = {branch: self.get_freqs_cis(batch, length, device) for branch, length in lengths.items()}
        return QwenImageCond(tables, self.image_tokens(batch, dtype), self.additional_t_cond(device))

    def additional_t_cond(self, device: torch.device) -> Tensor | None:
        """Return which learned vector joins the timestep's embedding: the first, that of pictures with transparency."""
        return torch.zeros(1, dtype=torch.long, device=device) if self.use_additional_t_cond else None

    def get_freqs_cis(self, batch: Req, num_text_tokens: int, device: torch.device) -> Tensor:
        """Return the rotary table of text, picture and input images, in this order."""
        grids = self.token_grids(batch)
        numbers = list(range(len(grids)))
        first = max(max(grid) // 2 for grid in grids)
        if self.use_layer3d_rope:
            numbers[-1] = -1
            first = max(first, len(grids) - 1)
        text_ids = torch.arange(first, first + num_text_tokens, dtype=torch.float32, device=device)
        image_ids = [centred_ids(*grid, number, device) for grid, number in zip(grids, numbers, strict=True)]
        ids = torch.cat((text_ids[:, None].expand(-1, 3), *image_ids))
        return rotary_table(ids, self.axes_dims_rope, dtype=torch.float32)

    def transformer_kwargs(self, branch: str, batch: Req, latent_model_input: Latents, t: Tensor) -> dict[str, Tensor]:
        """Return the transformer's arguments."""
        assert isinstance(latent_model_input, Tensor)
        cond: QwenImageCond = batch.cond
        kwargs = {
            "hidden_states": latent_model_input,
            "encoder_hidden_states": embeds_of(branch, batch)[0],
            "timestep": unit_timestep(t, latent_model_input),
            "freqs_cis": cond.freqs_cis[branch],
            "condition_hidden_states": cond.image_tokens,
            "additional_t_cond": cond.additional_t_cond,
        }
        return {name: value for name, value in kwargs.items() if value is not None}

    def rescales_guidance(self, batch: Req) -> bool:
        """Say whether a guided token is as long as the positive branch has it."""
        return True

    def combine_guidance(self, batch: Req, predictions: Sequence[Prediction], t: Tensor) -> Prediction:
        """Join the branches, each token as long as the positive branch has it."""
        combined = super().combine_guidance(batch, predictions, t)
        if len(predictions) == 1 or not self.rescales_guidance(batch):
            return combined
        positive = predictions[0]
        assert isinstance(positive, Tensor) and isinstance(combined, Tensor)
        lengths = [torch.norm(prediction, dim=-1, keepdim=True) for prediction in (positive, combined)]
        rescaled: Tensor = combined * (lengths[0] / lengths[1])
        return rescaled


@dataclass(frozen=True, kw_only=True)
class QwenImageInputPipelineConfig(QwenImagePipelineConfig):
    """Conventions of the pipelines that take images: the VAE sees them, and one of them gives the size."""

    task: ClassVar[ModelTaskType] = ModelTaskType.TI2I
    max_text_tokens: ClassVar[int] = UNCUT
    num_input_images: ClassVar[tuple[int, int]] = (1, 1)

    def own_defaults(self) -> dict[str, Any]:
        """Return nothing: height and width are those of the input image, fitted."""
        return {}

    def prepare_vae_input(self, batch: Req, index: int) -> Tensor:
        """Return an input image, [1, C, 1, H, W]."""
        params = params_of(batch, QwenImageEditSamplingParams)
        image = params.input_images()[index]
        return image_to_tensor(image, *params.vae_size(image))[:, :, None]

    def condition_images(self, batch: Req) -> list[Image.Image]:
        """Return the input images at the sizes at which the text encoder sees them."""
        params = params_of(batch, QwenImageEditSamplingParams)
        return [
            image.resize(params.condition_size(image)[::-1], Image.Resampling.LANCZOS)
            for image in params.input_images()
        ]


@dataclass(frozen=True, kw_only=True)
class QwenImageEditPipelineConfig(QwenImageInputPipelineConfig):
    """Conventions of `QwenImageEditPipeline`: the text encoder sees the input image too."""

    template: ClassVar[PromptTemplate] = EDIT_TEMPLATE

    def image_places(self, batch: Req) -> str:
        """Return the text before the prompt that stands for the images."""
        return IMAGE_PLACE

    def text_encoder_inputs(
        self, spec: PromptSpec, text: str, batch: Req, tokenizer: Any, processor: Any
    ) -> dict[str, Tensor]:
        """Return token ids [1, S], and the places, pixels and grids of the images among them."""
        return vision_inputs(text, self.condition_images(batch), tokenizer, processor)


@dataclass(frozen=True, kw_only=True)
class QwenImageEditPlusPipelineConfig(QwenImageEditPipelineConfig):
    """Conventions of `QwenImageEditPlusPipeline`: several input images, numbered in the text."""

    num_input_images: ClassVar[tuple[int, int]] = (1, MAX_INPUT_IMAGES)

    def image_places(self, batch: Req) -> str:
        """Return the text before the prompt that stands for the images."""
        images = params_of(batch, QwenImageEditSamplingParams).input_images()
        return "".join(NUMBERED_IMAGE_PLACE.format(number) for number, _ in enumerate(images, 1))


@dataclass(frozen=True, kw_only=True)
class QwenImageLayeredPipelineConfig(QwenImageInputPipelineConfig):
    """Conventions of `QwenImageLayeredPipeline`: the composite and its layers are made together, in one sequence.

    The text encoder sees the input image only to write a caption of it.
    """

    switches: ClassVar[Mapping[str, tuple[bool, ...]]] = {"zero_cond_t": (False,)}
    """In the reference all layers but the composite would be steered as at time 0, which no model was trained for."""

    def caption_inputs(self, text: str, batch: Req, tokenizer: Any, processor: Any) -> dict[str, Tensor]:
        """Return what the text encoder is given to write a caption of the input image."""
        inputs = vision_inputs(text, self.condition_images(batch), tokenizer, processor)
        return {**inputs, "attention_mask": torch.ones_like(inputs["input_ids"])}

    def prepare_latent_shape(self, batch: Req) -> tuple[int, ...]:
        """Return [1, 1 + layers, C, H, W] in latent pixels: the composite, then its layers."""
        layers = params_of(batch, QwenImageLayeredSamplingParams).layers
        assert layers is not None
        return (1, 1 + layers, *super().prepare_latent_shape(batch)[1:])

    def maybe_pack_latents(self, latents: Tensor, batch: Req) -> Latents:
        """Return [1, (1 + layers) * S, 4C]."""
        return pack_latents(latents[0]).flatten(0, 1)[None]

    def post_denoising_loop(self, latents: Latents, batch: Req) -> Tensor:
        """Return the layers, [layers, C, 1, H, W], of packed latents; the composite is dropped."""
        assert isinstance(latents, Tensor)
        pictures = latents.view(batch.raw_latent_shape[1], -1, latents.shape[-1])
        return unpack_latents(pictures[1:], *batch.raw_latent_shape[-2:])[:, :, None]

    def spaced_sigmas(self, num_steps: int) -> list[float]:
        """Return evenly spaced noise levels from 1, of which the solver's final one, 0, is the next."""
        spaced: list[float] = np.linspace(1.0, 0.0, num_steps + 1)[:-1].tolist()
        return spaced

    def prepare_mu(self, batch: Req, scheduler_config: Mapping[str, Any]) -> float | None:
        """Return the shift for this many tokens of the input image."""
        height, width = batch.image_latents[0].shape[-2:]
        num_tokens = height // PATCH_SIZE * (width // PATCH_SIZE)
        return float((num_tokens / LAYERED_BASE_TOKENS) ** 0.5)

    def picture_shapes(self, batch: Req) -> list[tuple[int, ...]]:
        """Return the shape [..., H, W] in latent pixels of the composite and each layer."""
        return [batch.raw_latent_shape] * batch.raw_latent_shape[1]

    def rescales_guidance(self, batch: Req) -> bool:
        """Return `cfg_normalize`."""
        return bool(params_of(batch, QwenImageLayeredSamplingParams).cfg_normalize)


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
