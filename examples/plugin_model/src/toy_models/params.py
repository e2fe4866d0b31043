"""What may be asked of the toy models. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from safelight.core.options import option
from safelight.core.params import SamplingParams
from safelight.core.shared_params import CFGParams


@dataclass(frozen=True, kw_only=True)
class ToySamplingParams(CFGParams):
    """Parameters of `ToyPipeline`: the common fields, without images and videos; guidance above 1."""

    defaults: ClassVar[Mapping[str, Any]] = {
        **SamplingParams.defaults,
        "height": 64,
        "width": 64,
        "num_inference_steps": 4,
        "guidance_scale": 3.0,
    }
    excluded: ClassVar[frozenset[str]] = frozenset({"image", "num_frames", "fps"})


@dataclass(frozen=True, kw_only=True)
class ToyVariationSamplingParams(ToySamplingParams):
    """Parameters of `ToyVariationPipeline`: an image too, and how far to go from it."""

    strength: float | None = option(
        "number", "how far to go from the image: 0 is hardly, 1 is all the way", minimum=0.0, maximum=1.0
    )

    defaults: ClassVar[Mapping[str, Any]] = {**ToySamplingParams.defaults, "strength": 0.6}
    excluded: ClassVar[frozenset[str]] = frozenset({"num_frames", "fps"})
