"""What may be asked of Chroma. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from safelight.core.options import option
from safelight.core.params import SamplingParams
from safelight.core.shared_params import CFGParams, SigmasParams

IP_ADAPTER = ("ip_adapter_image", "ip_adapter_image_embeds")


@dataclass(frozen=True, kw_only=True)
class ChromaSamplingParams(CFGParams, SigmasParams):
    """Parameters of `ChromaPipeline`."""

    max_sequence_length: int | None = option("integer", "tokens of the text encoder", minimum=1, maximum=512)

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
        **dict.fromkeys(IP_ADAPTER, "IP-Adapter is not supported"),
        **dict.fromkeys((f"negative_{name}" for name in IP_ADAPTER), "IP-Adapter is not supported"),
    }
