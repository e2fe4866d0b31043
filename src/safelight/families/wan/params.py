"""What may be asked of Wan. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from safelight.core.options import option
from safelight.core.params import SamplingParams
from safelight.core.schema import ModelSchema
from safelight.core.shared_params import CFGParams
from safelight.errors import InvalidParameterError

if TYPE_CHECKING:
    from PIL import Image

TWO_STAGES = "two_stages"
"""Capability: one transformer for high noise and another for low (2.2), each with its guidance scale."""
LAST_IMAGE = "last_image"
"""Capability: the video may end in a given image."""
NEEDS_LAST_IMAGE = "needs_last_image"
"""Capability: the model was made for a first and a last image, and takes nothing less."""


@dataclass(frozen=True, kw_only=True)
class WanSamplingParams(CFGParams):
    """Parameters of `WanPipeline`. The first guidance scale decides for both transformers, as in Diffusers."""

    guidance_scale_2: float | None = option(
        "number", "guidance scale of the low-noise transformer; guidance_scale if unset", minimum=0.0
    )
    max_sequence_length: int | None = option("integer", "tokens of the text encoder", minimum=1, maximum=512)

    defaults: ClassVar[Mapping[str, Any]] = {
        **SamplingParams.defaults,
        "output_type": "np",
        "height": 480,
        "width": 832,
        "num_frames": 81,
        "fps": 16,
        "num_inference_steps": 50,
        "guidance_scale": 5.0,
        "max_sequence_length": 512,
    }
    refused: ClassVar[Mapping[str, str]] = {
        **SamplingParams.refused,
        "attention_kwargs": "attention is chosen by attention_backend when the model is loaded",
    }

    def validate(self, schema: ModelSchema, given: Mapping[str, Any]) -> None:
        """Check that a second guidance scale has a second transformer."""
        super().validate(schema, given)
        if self.guidance_scale_2 is not None and TWO_STAGES not in schema.capabilities:
            raise InvalidParameterError(
                "guidance_scale_2", self.guidance_scale_2, "nothing here: this model has no boundary_ratio"
            )

    def warnings(self, schema: ModelSchema, given: Mapping[str, Any]) -> list[str]:
        """Name what has no effect without guidance."""
        found = super().warnings(schema, given)
        if self.guidance_scale is not None and self.guidance_scale <= 1:
            effectless = [name for name in ("negative_prompt", "guidance_scale_2") if name in given]
            found += [f"{name} has no effect unless guidance_scale is above 1" for name in effectless]
        return found


@dataclass(frozen=True, kw_only=True)
class WanImageToVideoSamplingParams(WanSamplingParams):
    """Parameters of `WanImageToVideoPipeline`."""

    last_image: Image.Image | None = option("image", "the image that the video ends in")  # noqa: RUF009 - None

    refused: ClassVar[Mapping[str, str]] = {**WanSamplingParams.refused, "image_embeds": "use image"}

    def validate(self, schema: ModelSchema, given: Mapping[str, Any]) -> None:
        """Check that a last image is there if and only if the model takes one."""
        super().validate(schema, given)
        if self.last_image is None:
            if NEEDS_LAST_IMAGE in schema.capabilities:
                raise InvalidParameterError("last_image", None, "an image: this model needs the first and the last")
        elif LAST_IMAGE not in schema.capabilities:
            raise InvalidParameterError("last_image", self.last_image, "nothing here: this model has no last image")
        elif self.num_frames == 1:
            raise InvalidParameterError("last_image", self.last_image, "nothing here: one frame is the first image")


@dataclass(frozen=True, kw_only=True)
class WanDMDSamplingParams(WanSamplingParams):
    """Parameters of `WanDMDPipeline`, which was distilled to a few given timesteps, without guidance."""

    timesteps: tuple[float, ...] | None = option(
        "numbers", "timesteps of the steps, falling; the model was distilled to its own", minimum=1.0, maximum=1000.0
    )

    defaults: ClassVar[Mapping[str, Any]] = {
        name: value
        for name, value in WanSamplingParams.defaults.items()
        if name not in ("num_inference_steps", "guidance_scale")
    }
    max_branches: ClassVar[int] = 1
    excluded: ClassVar[frozenset[str]] = frozenset(
        {"image", "negative_prompt", "guidance_scale", "guidance_scale_2", "scheduler"}
    )
    refused: ClassVar[Mapping[str, str]] = {
        **WanSamplingParams.refused,
        "scheduler": "no solver steps: the model was distilled to its own loop",
        **dict.fromkeys(
            ("negative_prompt", "guidance_scale", "guidance_scale_2"), "the model was distilled to run without guidance"
        ),
    }

    def num_steps(self) -> int:
        """Return the number of timesteps."""
        return len(self.timesteps or ())

    def validate(self, schema: ModelSchema, given: Mapping[str, Any]) -> None:
        """Check that timesteps fall, and that a number of steps, where it is given, is theirs."""
        super().validate(schema, given)
        if self.timesteps is None:
            return
        if list(self.timesteps) != sorted(set(self.timesteps), reverse=True):
            raise InvalidParameterError("timesteps", self.timesteps, "numbers that fall, each below the one before")
        if self.num_inference_steps not in (None, len(self.timesteps)):
            takes = f"the number of timesteps ({len(self.timesteps)})"
            raise InvalidParameterError("num_inference_steps", self.num_inference_steps, takes)
