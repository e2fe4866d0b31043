"""What may be asked of FLUX.1. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from safelight.core.options import option
from safelight.core.params import SamplingParams
from safelight.core.schema import ModelSchema
from safelight.core.shared_params import SigmasParams, TrueCFGParams
from safelight.errors import InvalidParameterError

TRAINED_AREA = 1024 * 1024
"""Pixels of an input image that is resized as Kontext was trained."""
EMBEDDED_GUIDANCE = "embedded_guidance"
"""Capability: the transformer was distilled with the guidance scale as an input (dev), or was not (schnell)."""


@dataclass(frozen=True, kw_only=True)
class FluxSamplingParams(TrueCFGParams, SigmasParams):
    """Parameters of `FluxPipeline`."""

    prompt_2: str | None = option("string", "another prompt for the T5 encoder; prompt if unset")
    negative_prompt_2: str | None = option("string", "another negative prompt for the T5 encoder")
    max_sequence_length: int | None = option("integer", "tokens of the T5 encoder", minimum=1, maximum=512)

    defaults: ClassVar[Mapping[str, Any]] = {
        **SamplingParams.defaults,
        "num_inference_steps": 28,
        "guidance_scale": 3.5,
        "true_cfg_scale": 1.0,
        "max_sequence_length": 512,
    }
    excluded: ClassVar[frozenset[str]] = frozenset({"image", "num_frames", "fps"})
    refused: ClassVar[Mapping[str, str]] = {
        **SamplingParams.refused,
        "pooled_prompt_embeds": "use prompt",
        "negative_pooled_prompt_embeds": "use negative_prompt",
        "joint_attention_kwargs": "attention is chosen by attention_backend when the model is loaded",
        "ip_adapter_image": "IP-Adapter is not supported",
        "ip_adapter_image_embeds": "IP-Adapter is not supported",
        "negative_ip_adapter_image": "IP-Adapter is not supported",
        "negative_ip_adapter_image_embeds": "IP-Adapter is not supported",
    }

    def warnings(self, schema: ModelSchema, given: Mapping[str, Any]) -> list[str]:
        """Name guidance that has no effect."""
        found = super().warnings(schema, given)
        if "guidance_scale" in given and EMBEDDED_GUIDANCE not in schema.capabilities:
            found.insert(0, "guidance_scale has no effect: this model has no embedded guidance")
        return found


@dataclass(frozen=True, kw_only=True)
class FluxKontextSamplingParams(FluxSamplingParams):
    """Parameters of `FluxKontextPipeline`. Height and width give the aspect, `max_area` the size."""

    max_area: int | None = option(
        "integer", "pixels of the output, at the aspect of height and width", minimum=1, maximum=16384**2
    )
    auto_resize: bool | None = option("boolean", "resize the input image to a size that Kontext was trained on")

    defaults: ClassVar[Mapping[str, Any]] = {
        **FluxSamplingParams.defaults,
        "max_area": 1024**2,
        "auto_resize": True,
    }
    excluded: ClassVar[frozenset[str]] = frozenset({"num_frames", "fps"})
    fits_size: ClassVar[bool] = True
    aliases: ClassVar[Mapping[str, str]] = {**FluxSamplingParams.aliases, "_auto_resize": "auto_resize"}

    def validate(self, schema: ModelSchema, given: Mapping[str, Any]) -> None:
        """Check that something is left of the sizes of picture and input image once they are fitted."""
        super().validate(schema, given)
        for image in self.image or ():
            if min(image.size) < schema.size_multiple:
                size = f"{image.width}x{image.height} pixels"
                raise InvalidParameterError("image", size, f"at least {schema.size_multiple} pixels along each side")
        height, width = self.output_size(schema.size_multiple)
        if not height or not width:
            raise InvalidParameterError(
                "max_area",
                self.max_area,
                f"enough for {schema.size_multiple} pixels along each side at {self.width}x{self.height}'s aspect",
            )

    def warnings(self, schema: ModelSchema, given: Mapping[str, Any]) -> list[str]:
        """Name the size that is made where it is not the one that was asked for."""
        found = super().warnings(schema, given)
        height, width = self.output_size(schema.size_multiple)
        if (height, width) != (self.height, self.width):
            found.append(f"size: {width}x{height} is made, {self.width}x{self.height}'s aspect at max_area")
        return found

    @classmethod
    def size_fields(cls, height: int, width: int) -> dict[str, Any]:
        """Return height and width, and the area that they would be fitted to."""
        return {**super().size_fields(height, width), "max_area": height * width}

    def num_sequence_tokens(self, schema: ModelSchema) -> int:
        """Return the tokens of the picture and of the input image, a megapixel unless it keeps its size."""
        areas = [TRAINED_AREA if self.auto_resize else image.width * image.height for image in self.image or ()]
        return self.num_latent_tokens(schema) + sum(areas) // schema.size_multiple**2

    def output_size(self, size_multiple: int) -> tuple[int, int]:
        """Return the (height, width) of the asked aspect with at most `max_area` pixels, in whole multiples."""
        assert self.height is not None and self.width is not None and self.max_area is not None
        aspect = self.width / self.height
        width = round((self.max_area * aspect) ** 0.5)
        height = round((self.max_area / aspect) ** 0.5)
        return height // size_multiple * size_multiple, width // size_multiple * size_multiple
