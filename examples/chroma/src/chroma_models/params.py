"""What may be asked of Chroma. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from safelight.core.params import SamplingParams, option
from safelight.core.schema import ModelSchema
from safelight.errors import InvalidParameterError


@dataclass(frozen=True, kw_only=True)
class ChromaSamplingParams(SamplingParams):
    """Parameters of `ChromaPipeline`."""

    max_sequence_length: int | None = option("integer", "tokens of the text encoder", minimum=1, maximum=512)
    sigmas: tuple[float, ...] | None = option("numbers", "noise levels of the steps", minimum=0.0, maximum=1.0)

    defaults: ClassVar[Mapping[str, Any]] = {
        **SamplingParams.defaults,
        "num_inference_steps": 35,
        "guidance_scale": 5.0,
        "max_sequence_length": 512,
    }
    excluded: ClassVar[frozenset[str]] = frozenset({"image", "num_frames", "fps"})
    refused: ClassVar[Mapping[str, str]] = {
        **SamplingParams.refused,
        "prompt_attention_mask": "use prompt",
        "negative_prompt_attention_mask": "use negative_prompt",
        "joint_attention_kwargs": "attention is chosen by attention_backend when the model is loaded",
        **dict.fromkeys(
            (
                "ip_adapter_image",
                "ip_adapter_image_embeds",
                "negative_ip_adapter_image",
                "negative_ip_adapter_image_embeds",
            ),
            "IP-Adapter is not supported",
        ),
    }

    def num_branches(self) -> int:
        """Guidance above 1 has a negative branch, with an empty prompt if there is none."""
        return 2 if self.guidance_scale is not None and self.guidance_scale > 1 else 1

    def validate(self, schema: ModelSchema, given: Mapping[str, Any]) -> None:
        """Check that sigmas and steps agree where both are given."""
        super().validate(schema, given)
        steps = given.get("num_inference_steps")
        if self.sigmas is not None and steps not in (None, len(self.sigmas)):
            raise InvalidParameterError("num_inference_steps", steps, f"the number of sigmas ({len(self.sigmas)})")
