"""What may be asked of the pipelines that fail. Imports no torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from safelight.core.params import SamplingParams
from safelight.core.shared_params import CFGParams


@dataclass(frozen=True, kw_only=True)
class FaultSamplingParams(CFGParams):
    """Parameters of `FaultPipeline`."""

    defaults: ClassVar[Mapping[str, Any]] = {
        **SamplingParams.defaults,
        "height": 64,
        "width": 64,
        "num_inference_steps": 4,
        "guidance_scale": 1.0,
    }
    excluded: ClassVar[frozenset[str]] = frozenset({"num_frames", "fps"})


@dataclass(frozen=True, kw_only=True)
class FaultVideoSamplingParams(FaultSamplingParams):
    """Parameters of `FaultVideoPipeline`."""

    defaults: ClassVar[Mapping[str, Any]] = {**FaultSamplingParams.defaults, "num_frames": 5, "fps": 8}
    excluded: ClassVar[frozenset[str]] = frozenset()
