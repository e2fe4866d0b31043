"""What is asked of a pipeline: by the names of its call's parameters, the same of every class."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from tests.backends.recipes.build import Tiny

HEIGHT, WIDTH = 32, 48
FIELDS: Mapping[str, Any] = {
    "prompt": "a photo of a cat sitting on a red chair",
    "negative_prompt": "blurry, low quality",
    "height": HEIGHT,
    "width": WIDTH,
    "num_frames": 5,
    "num_inference_steps": 3,
    "prior_num_inference_steps": 2,
    "max_sequence_length": 16,
    "use_resolution_binning": False,
    "true_cfg_scale": 2.0,
}
"""Asked of every call that takes it."""
OTHER: Mapping[str, Any] = {"prompt": "two dogs run across the wet field at dawn", "num_inference_steps": 2}
"""Asked of it the second time."""


def picture(phase: float = 0.0, height: int = HEIGHT, width: int = WIDTH) -> Image.Image:
    """Return a picture of waves, which differ by their phase."""
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(phase + x / (3.0 + channel) + y / (5.0 - channel)) for channel in range(3)]
    return Image.fromarray((127.5 * (1 + np.stack(waves, -1))).astype(np.uint8))


def mask(height: int = HEIGHT, width: int = WIDTH) -> Image.Image:
    """Return a mask: white, to be painted, in a part of it."""
    made = np.zeros((height, width), np.uint8)
    made[height // 4 : height // 2 + 3, width // 4 :] = 255
    return Image.fromarray(made)


def clip(num_frames: int = 5, height: int = HEIGHT, width: int = WIDTH) -> list[Image.Image]:
    """Return frames whose waves move."""
    return [picture(0.3 * frame, height, width) for frame in range(num_frames)]


REQUIRED: Mapping[str, Any] = {
    "image": picture(),
    "mask_image": mask(),
    "control_image": picture(1.0),
    "video": clip(),
    "last_image": picture(2.0),
}
"""Asked where the call has no default for it."""


def fields(tiny: Tiny, second: bool = False) -> dict[str, Any]:
    """Return what is asked of a pipeline, in its own words, without a seed and the form of the result."""
    parameters = inspect.signature(tiny.cls.__call__).parameters
    everywhere = {**FIELDS, **(OTHER if second else {})}
    asked = {name: value for name, value in everywhere.items() if name in parameters}
    for name, value in REQUIRED.items():
        if name in parameters and parameters[name].default is inspect.Parameter.empty:
            asked[name] = value
    asked |= {**tiny.asked, **(tiny.other if second else {})}
    return {name: value for name, value in asked.items() if value is not None}
