"""How what a request's stages take grows with its size: counted at a few sizes, on components without weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from safelight.core.schema import ModelSchema
from safelight.core.server_args import ServerArgs
from safelight.core.stage_memory import StageMemory
from safelight.loading.footprint import blank_images, empty_pipeline, rehearsed, request
from safelight.loading.repository import Repository

SIDES = (256, 512)
"""Of the pictures that are counted, in pixels: of these two all that lies between and beyond is a line."""
FRAMES = 8
"""Of a latent frame, or several, where the model does not say: of every VAE that is known."""
Size = tuple[int, int]
"""Pixels of a frame, and tokens of a step."""


def count_memory(repository: Repository, server_args: ServerArgs, in_bands: bool) -> tuple[StageMemory, ...]:
    """Return what each stage of a model's requests takes, without reading weights.

    Args:
        repository: the model.
        server_args: with which it was loaded.
        in_bands: whether it is decoded in bands.

    Raises:
        UsageError: if the model takes no request of these sizes.

    """
    dtype = str(server_args.component_dtype("")).removeprefix("torch.")  # of components with none of their own
    args = dataclasses.replace(server_args, dtype=dtype)
    counted: list[tuple[Size, Mapping[str, int]]] = []
    pipeline = empty_pipeline(repository, args, in_bands)
    for fields in requests(pipeline.schema, with_images=pipeline.native):
        req = request(pipeline.schema, fields)
        most: dict[str, int] = {}
        for stage in rehearsed(pipeline, req).stages():
            most[stage.stage] = max(stage.activations, most.get(stage.stage, 0))
        size = (req.params.num_pixels(pipeline.schema), req.params.num_sequence_tokens(pipeline.schema))
        counted.append((size, most))
    return fit(counted)


def requests(schema: ModelSchema, with_images: bool) -> list[dict[str, Any]]:
    """Return the fields of requests that differ by one measure each: the picture, the frames, the input images.

    Where it is not known what input images make longer, a request has as few as it may.
    """
    small, large = (-(-side // schema.size_multiple) * schema.size_multiple for side in SIDES)
    least, most = schema.num_input_images
    first = _fields(schema, small, 1, least)
    found = [first, _fields(schema, large, 1, least), _fields(schema, small, 3, least)]
    found += [_fields(schema, small, 1, least + 1)] if with_images and most > least else []
    return [first, *(fields for fields in found if fields != first)]


def _fields(schema: ModelSchema, side: int, num_groups: int, num_images: int) -> dict[str, Any]:
    fields: dict[str, Any] = schema.params_cls.size_fields(side, side)
    if schema.task.makes_video:
        fields["num_frames"] = 1 + num_groups * (schema.frame_step if schema.frame_step > 1 else FRAMES)
    if num_images:
        fields["image"] = blank_images(num_images, side, side)
    return fields


def fit(counted: Sequence[tuple[Size, Mapping[str, int]]]) -> tuple[StageMemory, ...]:
    """Return the plane through what was counted: of those that fit equally well, the one that rises least."""
    sizes = np.array([size for size, _ in counted], float)
    scales = sizes.max(0)
    measures = np.column_stack([np.ones(len(sizes)), sizes / scales])
    fitted = []
    for stage in dict.fromkeys(stage for _, most in counted for stage in most):
        taken = np.array([most.get(stage, 0) for _, most in counted], float)
        fixed, *slopes = np.linalg.lstsq(measures, taken, rcond=None)[0]
        per_pixel, per_token = (float(slope) for slope in slopes / scales)
        fitted.append(StageMemory(stage, float(fixed), per_pixel, per_token))
    return tuple(fitted)
