"""How text and image encoders are called: what their components' methods compute."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from safelight.core.components import Methods


def encode_text(encoder: Any, output: str, **inputs: Tensor) -> Tensor:
    """Return one of the outputs of a text encoder of the libraries, such as `last_hidden_state` [B, S, C]."""
    made: Tensor = encoder(**inputs)[output]
    return made


def encode_images(encoder: Any, pixel_values: Tensor) -> Tensor:
    """Return an image encoder's last hidden states but one, [N, S, C], of pixels [N, C, H, W]."""
    made: Tensor = encoder(pixel_values.to(encoder.dtype), output_hidden_states=True).hidden_states[-2]
    return made


ENCODER_METHODS: Mapping[str, Methods] = {
    "text_encoder": {"encode": encode_text},
    "image_encoder": {"encode": encode_images},
}
"""By the name of a component, which a number may follow, what it can do beside `forward`."""
