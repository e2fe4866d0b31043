"""What a user asked for, as resolved parameters: the one check at the edge. Imports no torch."""

from __future__ import annotations

import dataclasses
import functools
import secrets
from collections.abc import Callable, Mapping
from typing import Any

from safelight import media
from safelight.clips import open_clip
from safelight.core.options import MEDIA_KINDS, NULL
from safelight.core.params import SamplingParams
from safelight.core.schema import ModelSchema

SEED_RANGE = 2**53
"""Drawn seeds stay below it, so that a browser's JSON holds them."""
WARM_UP_STEPS = 2
"""Steps of the first request, where the model does not have its own: some schedules have no single one."""
WARM_UP_SIDE = 256
"""Pixels of the first request's sides, where the model has no smaller default."""


def prepare(schema: ModelSchema, fields: Mapping[str, Any]) -> tuple[SamplingParams, list[str]]:
    """Return what was asked for as resolved parameters, images opened and seed drawn, and what to warn of.

    Raises:
        UsageError: for what the model does not take; the message names the field.

    """
    asked = schema.params_cls.from_fields(fields)
    params = dataclasses.replace(asked, **opened(asked)).resolve(schema)
    assert params.n is not None
    if params.seed is None:
        params = dataclasses.replace(params, seed=secrets.randbelow(SEED_RANGE - params.n))
    warnings = [*schema.notes, *params.warnings(schema, asked.set_fields())]
    if asked.image_mode == "RGB" and any(media.has_alpha(image) for image in asked.given_images()):
        warnings.append("image: its alpha channel is not used")
    return params, warnings


def opened(asked: SamplingParams) -> dict[str, Any]:
    """Return the fields of input images and clips, with these opened.

    Raises:
        InvalidParameterError: naming the field of one that cannot be read.

    """
    found: dict[str, Any] = {}
    for name, option in asked.options().items():
        if option.kind not in MEDIA_KINDS or (value := vars(asked)[name]) is None:
            continue
        value = option.check(name, value)
        if option.kind == "clip":
            found[name] = value if value is NULL else open_clip(value, name)
        elif value is not NULL:
            opens = functools.partial(_opened, asked, name)
            found[name] = _each(value, opens, nothing=option.kind == "pictures")
    return found


def _opened(asked: SamplingParams, name: str, value: Any) -> Any:
    """Return a field's picture, in the mode that it is used in."""
    return media.open_image(value, name, asked.mode_of(name), asked.needs_alpha(name))


def _each(value: Any, change: Callable[[Any], Any], nothing: bool) -> Any:
    """Return a value changed, in whatever tuples it stands; None stays where `nothing` may stand in a list."""
    if isinstance(value, tuple):
        return tuple(_each(entry, change, nothing) for entry in value)
    return None if nothing and value is None else change(value)


def warm_up_params(schema: ModelSchema) -> SamplingParams:
    """Return a small request that the model takes: few steps, few pixels, few frames, no image that it can do without.

    Raises:
        UsageError: if the model does not take it.

    """
    from PIL import Image

    options = schema.params_cls.options()
    side = -(-WARM_UP_SIDE // schema.size_multiple) * schema.size_multiple
    height, width = (min(side, schema.defaults.get(name) or side) for name in ("height", "width"))
    small: dict[str, Any] = {"prompt": "warm-up", "num_inference_steps": WARM_UP_STEPS, "seed": 0, "output_type": "pil"}
    small |= {"n": 1, "num_frames": 1 + schema.frame_step, **schema.params_cls.size_fields(height, width)}
    if schema.num_input_images[0]:
        small["image"] = [Image.new("RGB", (side, side), (128, 128, 128))] * schema.num_input_images[0]
    kept = {name: value for name, value in small.items() if name in options}
    if schema.params_cls.num_steps is not SamplingParams.num_steps:  # the model's steps are its own
        kept.pop("num_inference_steps", None)
    return prepare(schema, kept)[0]
