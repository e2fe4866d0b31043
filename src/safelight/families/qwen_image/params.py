"""What may be asked of Qwen-Image. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from PIL import Image

from safelight.core.options import option
from safelight.core.params import SamplingParams
from safelight.core.schema import ModelSchema
from safelight.core.shared_params import SigmasParams, TrueCFGParams
from safelight.errors import InvalidParameterError

OUTPUT_SIZE = 1024 * 1024
"""Pixels of an edited picture, unless its height and width are given."""
VAE_IMAGE_SIZE = 1024 * 1024
"""Pixels of an input image that the VAE encodes."""
CONDITION_IMAGE_SIZE = 384 * 384
"""Pixels of one of several input images that the text encoder sees."""
FITTED_MULTIPLE = 32
"""Fitted sides are multiples of it."""
MAX_ASPECT = 200
"""Long side over short side, of an image that the text encoder takes."""
MAX_INPUT_IMAGES = 10
"""Of an edit with several images. The model was trained with up to `TRAINED_INPUT_IMAGES`."""
TRAINED_INPUT_IMAGES = 3
LAYERED_RESOLUTIONS = (640, 1024)
"""Square roots of the areas that the layered model was trained on."""
PLACEHOLDERS = ("<|image_pad|>", "<|video_pad|>")
"""Tokens that stand for an image or a video in the text encoder's input; a prompt may not contain them."""


def fitted_size(area: float, size: tuple[int, int]) -> tuple[int, int]:
    """Return the (height, width) of about `area` pixels at the aspect of `size`, a (width, height)."""
    aspect = size[0] / size[1]
    width = math.sqrt(area * aspect)
    height = width / aspect
    return round(height / FITTED_MULTIPLE) * FITTED_MULTIPLE, round(width / FITTED_MULTIPLE) * FITTED_MULTIPLE


@dataclass(frozen=True, kw_only=True)
class QwenImageSamplingParams(TrueCFGParams, SigmasParams):
    """Parameters of `QwenImagePipeline`."""

    max_sequence_length: int | None = option("integer", "tokens of the prompt that are kept", minimum=1, maximum=1024)

    defaults: ClassVar[Mapping[str, Any]] = {
        **SamplingParams.defaults,
        "num_inference_steps": 50,
        "true_cfg_scale": 4.0,
        "max_sequence_length": 512,
    }
    excluded: ClassVar[frozenset[str]] = frozenset({"image", "num_frames", "fps"})
    refused: ClassVar[Mapping[str, str]] = {
        **SamplingParams.refused,
        "prompt_embeds_mask": "use prompt",
        "negative_prompt_embeds_mask": "use negative_prompt",
        "attention_kwargs": "attention is chosen by attention_backend when the model is loaded",
    }
    cuts_prompts: ClassVar[bool] = True
    """Whether prompts are cut to `max_sequence_length`."""

    def warnings(self, schema: ModelSchema, given: Mapping[str, Any]) -> list[str]:
        """Name what has no effect on this model, or not together."""
        found = super().warnings(schema, given)
        if "guidance_scale" in given:
            found.insert(0, "guidance_scale has no effect: this model has no embedded guidance; use true_cfg_scale")
        if "max_sequence_length" in given and not self.cuts_prompts:
            found.append("max_sequence_length has no effect: prompts that go with images are not cut")
        return found


@dataclass(frozen=True, kw_only=True)
class QwenImageEditSamplingParams(QwenImageSamplingParams):
    """Parameters of `QwenImageEditPipeline`.

    Height and width, where unset, are those of about a megapixel at the aspect of the input image, the last one where
    there are several. They stay unset in resolved parameters; `output_size` is what is made.
    """

    excluded: ClassVar[frozenset[str]] = frozenset({"num_frames", "fps"})
    cuts_prompts: ClassVar[bool] = False

    def validate(self, schema: ModelSchema, given: Mapping[str, Any]) -> None:
        """Check that the images can be fitted, and that prompts leave the places of images alone."""
        super().validate(schema, given)
        for image in self.input_images():
            for height, width in (self.vae_size(image), self.condition_size(image)):
                if not min(height, width) or max(height, width) > MAX_ASPECT * min(height, width):
                    size = f"{image.width}x{image.height} pixels"
                    takes = f"an aspect below {MAX_ASPECT}:1, with sides rounded to multiples of {FITTED_MULTIPLE} too"
                    raise InvalidParameterError("image", size, takes)
        for name, value in (("prompt", self.prompt), ("negative_prompt", self.negative_prompt)):
            for text in value if isinstance(value, tuple) else (value or "",):
                if any(token in text for token in PLACEHOLDERS):
                    raise InvalidParameterError(name, text, f"text without {' or '.join(PLACEHOLDERS)}")

    def input_images(self) -> tuple[Image.Image, ...]:
        """Return the input images, opened."""
        assert self.image is not None
        return self.image

    def output_size(self, size_multiple: int) -> tuple[int, int]:
        """Return the (height, width) that is made: each side as asked for, or as the last image has it."""
        height, width = fitted_size(OUTPUT_SIZE, self.input_images()[-1].size)
        return self.height or height, self.width or width

    def num_sequence_tokens(self, schema: ModelSchema) -> int:
        """Return the tokens of the picture and of all input images."""
        areas = [math.prod(self.vae_size(image)) for image in self.input_images()]
        return self.num_latent_tokens(schema) + sum(areas) // schema.size_multiple**2

    def vae_size(self, image: Image.Image) -> tuple[int, int]:
        """Return the (height, width) at which the VAE encodes an input image."""
        return fitted_size(VAE_IMAGE_SIZE, image.size)

    def condition_size(self, image: Image.Image) -> tuple[int, int]:
        """Return the (height, width) at which the text encoder sees an input image."""
        return self.vae_size(image)


@dataclass(frozen=True, kw_only=True)
class QwenImageEditPlusSamplingParams(QwenImageEditSamplingParams):
    """Parameters of `QwenImageEditPlusPipeline`."""

    def condition_size(self, image: Image.Image) -> tuple[int, int]:
        """Return the (height, width) at which the text encoder sees an input image."""
        return fitted_size(CONDITION_IMAGE_SIZE, image.size)

    def warnings(self, schema: ModelSchema, given: Mapping[str, Any]) -> list[str]:
        """Name what has no effect on this model, or not together, and more images than it was trained with."""
        found = super().warnings(schema, given)
        if len(self.input_images()) > TRAINED_INPUT_IMAGES:
            found.append(f"image: the model was trained with at most {TRAINED_INPUT_IMAGES} images")
        return found


@dataclass(frozen=True, kw_only=True)
class QwenImageLayeredSamplingParams(QwenImageEditSamplingParams):
    """Parameters of `QwenImageLayeredPipeline`. An empty prompt is replaced by a caption that the model writes."""

    layers: int | None = option("integer", "layers to decompose the image into", group="basic", minimum=1, maximum=64)
    resolution: int | None = option(
        "integer", "square root of the pixels of a layer, 640 or 1024", minimum=640, maximum=1024
    )
    cfg_normalize: bool | None = option("boolean", "give the guided prediction the length of the one without guidance")
    use_en_prompt: bool | None = option("boolean", "write the caption in English rather than in Chinese")

    defaults: ClassVar[Mapping[str, Any]] = {
        **QwenImageEditSamplingParams.defaults,
        "prompt": "",
        "layers": 4,
        "resolution": 640,
        "cfg_normalize": False,
        "use_en_prompt": False,
    }
    excluded: ClassVar[frozenset[str]] = frozenset({"height", "width", "num_frames", "fps"})
    cuts_prompts: ClassVar[bool] = True
    image_mode: ClassVar[str] = "RGBA"
    makes_alpha: ClassVar[bool] = True

    def validate(self, schema: ModelSchema, given: Mapping[str, Any]) -> None:
        """Check the resolution."""
        if self.resolution not in LAYERED_RESOLUTIONS:
            takes = " or ".join(str(resolution) for resolution in LAYERED_RESOLUTIONS)
            raise InvalidParameterError("resolution", self.resolution, takes)
        super().validate(schema, given)

    def warnings(self, schema: ModelSchema, given: Mapping[str, Any]) -> list[str]:
        """Name what has no effect on this model, or not together."""
        found = super().warnings(schema, given)
        if self.use_en_prompt and not any(needs_caption(prompt) for prompt in self.prompts()):
            found.append("use_en_prompt has no effect with a prompt: it is the language of the caption")
        if self.cfg_normalize and self.num_branches() == 1:
            found.append("cfg_normalize has no effect without negative_prompt and a true_cfg_scale above 1")
        return found

    def num_latent_tokens(self, schema: ModelSchema) -> int:
        """Return the tokens of the composite and of its layers."""
        assert self.layers is not None
        return super().num_latent_tokens(schema) * (1 + self.layers)

    def num_pictures(self) -> int:
        """Return how many layers an output has."""
        assert self.layers is not None
        return self.layers

    def output_size(self, size_multiple: int) -> tuple[int, int]:
        """Return the (height, width) of a layer."""
        return self.vae_size(self.input_images()[0])

    def vae_size(self, image: Image.Image) -> tuple[int, int]:
        """Return the (height, width) of the input image as the model sees it."""
        assert self.resolution is not None
        return fitted_size(self.resolution**2, image.size)


def needs_caption(prompt: str) -> bool:
    """Say whether the model is to write the prompt itself."""
    return prompt in ("", " ")
