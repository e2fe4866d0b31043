"""How pixels become files: pictures with how they were made inside, thumbnails, sheets. Imports no torch."""

from __future__ import annotations

import contextlib
import json
import math
import threading
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from safelight import media, video
from safelight.errors import InvalidParameterError
from safelight.runtime.client import Media

Pixels = NDArray[np.uint8]

MEDIA_TYPES: Mapping[str, str] = {
    "png": "image/png",
    "jpeg": "image/jpeg",
    "webp": "image/webp",
    "mp4": "video/mp4",
    "wav": "audio/wav",
}
"""By output format; a file's name ends in the format."""
THUMBNAIL_SIDE, TILE_SIDE, MAX_TILES = 512, 256, 16
_MAX_EXIF_TEXT = 60_000
"""JPEG holds 65,533 bytes of EXIF."""
_LONG_TEXT = 1_000
"""Characters of one that is left out where JPEG does not hold the whole."""
_LARGE_PICTURE = 8 << 20
"""Values of a picture from which on it is encoded alone: it takes as much again, and its file's length."""
_ONE_LARGE = threading.Lock()


def encode_image(
    array: Pixels, output_format: str, compression: int | None = None, metadata: Mapping[str, Any] | None = None
) -> bytes:
    """Return a picture's file.

    Args:
        array: uint8 [H, W, C] of 1, 3 or 4 channels.
        output_format: png, jpeg or webp.
        compression: quality from 0 to 100 of jpeg and webp; None is 95 for jpeg, and lossless for webp.
        metadata: what JSON can hold; in a PNG's text, or the EXIF user comment of the others.

    Raises:
        InvalidParameterError: for an unknown format, or for an alpha channel in jpeg, which has none.

    """
    if output_format not in media.BEST_OPTIONS:
        raise InvalidParameterError("output_format", output_format, f"one of {', '.join(media.BEST_OPTIONS)}")
    if output_format == "jpeg" and array.shape[-1] == 4:
        raise InvalidParameterError("output_format", "jpeg", "png or webp: this picture has an alpha channel")
    options, text = _options(output_format, compression), None
    if metadata is not None:
        text = json.dumps(metadata)
        if output_format == "jpeg" and len(text) > _MAX_EXIF_TEXT:
            text = json.dumps({k: v for k, v in metadata.items() if not (isinstance(v, str) and len(v) > _LONG_TEXT)})
    with _ONE_LARGE if array.size > _LARGE_PICTURE else contextlib.nullcontext():
        picture = Image.fromarray(array.squeeze(-1) if array.shape[-1] == 1 else array)
        return media.encoded(picture, output_format, options, text)


def _options(output_format: str, compression: int | None) -> Mapping[str, Any]:
    """Return what Pillow is told."""
    if output_format == "png":  # zlib's level 1: level 6 takes several times as long for files that are little smaller
        return {"compress_level": 1}
    if compression is None:
        return media.BEST_OPTIONS[output_format]
    return {"quality": compression, **({"subsampling": 0} if output_format == "jpeg" else {})}


def thumbnail(frames: Media) -> bytes:
    """Return WebP of the first frame of a video [T, H, W, 3], within a square of 512 pixels."""
    return encode_image(np.asarray(_fitted(frames[0], THUMBNAIL_SIDE)), "webp", 80)


def spritesheet(frames: Media) -> bytes:
    """Return JPEG: at most 16 frames of a video [T, H, W, 3], evenly apart, in rows as in a text."""
    count = min(MAX_TILES, len(frames))
    chosen = [_fitted(frames[index * len(frames) // count], TILE_SIDE) for index in range(count)]
    columns = math.ceil(math.sqrt(count))
    width, height = chosen[0].size
    sheet = Image.new("RGB", (columns * width, math.ceil(count / columns) * height))
    for index, tile in enumerate(chosen):
        sheet.paste(tile, (index % columns * width, index // columns * height))
    return encode_image(np.asarray(sheet), "jpeg", 85)


def _fitted(frame: Pixels, side: int) -> Image.Image:
    image = Image.fromarray(video.as_rgb(frame))
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    return image
