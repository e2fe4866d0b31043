"""Parameters that several families have in common: pieces that they choose. Imports no torch.

A family's parameters subclass the pieces that fit: `class MyParams(TrueCFGParams, SigmasParams)`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from safelight.core.options import option
from safelight.core.params import SamplingParams
from safelight.core.schema import ModelSchema
from safelight.errors import InvalidParameterError

OWN_SIGMAS = "own_sigmas"
"""Capability: the solver spaces its noise levels itself."""
TERMINAL_SHIFT = "terminal_shift"
"""Capability: the solver stretches its schedule to end at a given noise level, which needs more than one step."""


@dataclass(frozen=True, kw_only=True)
class CFGParams(SamplingParams):
    """Classifier-free guidance (Ho & Salimans, 2022, arXiv:2207.12598) where `guidance_scale` is above 1."""

    max_branches: ClassVar[int] = 2

    def cfg_scale(self) -> float:
        """Return `guidance_scale`."""
        return 1.0 if self.guidance_scale is None else self.guidance_scale

    def num_branches(self) -> int:
        """Return two with guidance."""
        return 2 if self.cfg_scale() > 1 else 1


@dataclass(frozen=True, kw_only=True)
class TrueCFGParams(SamplingParams):
    """Guidance beside a `guidance_scale` that is an input of the model, or nothing: with a scale of its own.

    As in Diffusers, it needs a scale above 1 and a negative prompt.
    """

    true_cfg_scale: float | None = option(
        "number", "classifier-free guidance against negative_prompt, above 1", minimum=0.0
    )

    max_branches: ClassVar[int] = 2

    def cfg_scale(self) -> float:
        """Return `true_cfg_scale`."""
        assert self.true_cfg_scale is not None
        return self.true_cfg_scale

    def num_branches(self) -> int:
        """Return two with guidance."""
        return 2 if self.cfg_scale() > 1 and self.negative_prompt is not None else 1

    def image_fields(self) -> dict[str, Any]:
        """Leave out the scale."""
        return {name: value for name, value in super().image_fields().items() if name != "true_cfg_scale"}

    def warnings(self, schema: ModelSchema, given: Mapping[str, Any]) -> list[str]:
        """Name half of what guidance needs."""
        found = super().warnings(schema, given)
        if self.negative_prompt is not None and self.cfg_scale() <= 1:
            found.append("negative_prompt has no effect unless true_cfg_scale is above 1")
        if "true_cfg_scale" in given and self.cfg_scale() > 1 and self.negative_prompt is None:
            found.append("true_cfg_scale has no effect without negative_prompt")
        return found


@dataclass(frozen=True, kw_only=True)
class SigmasParams(SamplingParams):
    """Noise levels that may be given, instead of their number."""

    sigmas: tuple[float, ...] | None = option("numbers", "noise levels of the steps", minimum=0.0, maximum=1.0)

    def image_fields(self) -> dict[str, Any]:
        """Leave out the noise levels."""
        return {name: value for name, value in super().image_fields().items() if name != "sigmas"}

    def validate(self, schema: ModelSchema, given: Mapping[str, Any]) -> None:
        """Check that steps and sigmas, where both are given, agree, and that the solver can take them."""
        super().validate(schema, given)
        steps = given.get("num_inference_steps")
        if self.sigmas is not None and self.scheduler is None and OWN_SIGMAS in schema.capabilities:
            raise InvalidParameterError("sigmas", self.sigmas, "nothing for this model, whose solver has its own")
        if self.sigmas is not None and steps not in (None, len(self.sigmas)):
            raise InvalidParameterError("num_inference_steps", steps, f"the number of sigmas ({len(self.sigmas)})")
        if TERMINAL_SHIFT not in schema.capabilities:
            return
        if self.sigmas is None and self.num_inference_steps == 1:
            raise InvalidParameterError("num_inference_steps", 1, "at least 2, by this model's schedule")
        if self.sigmas is not None and self.sigmas[-1] == 1:
            raise InvalidParameterError("sigmas", self.sigmas, "a last noise level below 1, by this model's schedule")
