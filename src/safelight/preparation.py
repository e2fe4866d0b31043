"""What a user asked for, as resolved parameters: the one check at the edge. Imports no torch."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Mapping
from typing import Any

from safelight import media
from safelight.core.params import SamplingParams
from safelight.core.schema import ModelSchema

SEED_RANGE = 2**53
"""Drawn seeds stay below it, so that a browser's JSON holds them."""


def prepare(schema: ModelSchema, fields: Mapping[str, Any]) -> tuple[SamplingParams, list[str]]:
    """Return what was asked for as resolved parameters, images opened and seed drawn, and what to warn of.

    Raises:
        UsageError: for what the model does not take; the message names the field.

    """
    asked = schema.params_cls.from_fields(fields)
    images = _as_list(asked.image)
    if images:
        opened = tuple(media.open_image(image, mode=asked.image_mode) for image in images)
        asked = dataclasses.replace(asked, image=opened)
    single = [name for name, option in asked.options().items() if option.kind == "image"]
    others: dict[str, Any] = {name: value for name, value in asked.set_fields().items() if name in single}
    others = {name: media.open_image(value, name, asked.image_mode) for name, value in others.items()}
    params = dataclasses.replace(asked, **others).resolve(schema)
    assert params.n is not None
    if params.seed is None:
        params = dataclasses.replace(params, seed=secrets.randbelow(SEED_RANGE - params.n))
    warnings = [*schema.notes, *params.warnings(schema, asked.set_fields())]
    if asked.image_mode == "RGB" and any(media.has_alpha(image) for image in images):
        warnings.append("image: its alpha channel is not used")
    return params, warnings


def _as_list(image: Any) -> list[Any]:
    if image is None:
        return []
    return list(image) if isinstance(image, list | tuple) else [image]
