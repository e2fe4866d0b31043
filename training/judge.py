"""Say what a picture shows by classical image analysis; knows nothing of the model.

The background is the palette colour nearest to the border, the shape is every pixel that is not
background, position comes from the shape's bounding box, size from its extent, and the kind of
shape from its overlap with ideal shapes of the same area and centroid. A picture that is not one flat
shape on a flat background gets no verdict but a reason. Imports numpy and pillow only.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from training.shapes import PALETTE, SHAPES, Scene, mask_at

Pixels = NDArray[np.float32]
Mask = NDArray[np.bool_]

# Euclidean, 0 to 255 a channel: a colour further than this from every palette colour is none.
MAX_COLOUR_DISTANCE = 50.0
# A pixel further than this from every blend of the two flat colours is dirt.
MAX_BLEND_DISTANCE = 40.0
MAX_DIRT_FRACTION = 0.01
# Blended pixels, as a multiple of the shape's extent: drawn outlines have 2 to 4, and 8 is what a
# Gaussian blur of 0.9 pixels makes of them.
MAX_BLENDED_PER_EXTENT = 8.0
# A pixel this near to a flat colour is flat to the eye, also where the two colours are similar.
FLAT_DISTANCE = 20.0
FINENESS = 4
MIN_OVERLAP = 0.85
MIN_OVERLAP_MARGIN = 0.03
MAX_STRETCH = 1.2
# Extent over the picture's shorter side.
EXTENTS = {"small": (0.15, 0.28), "large": (0.32, 0.54)}
# Distance from the middle, as a fraction of width or height.
MAX_OFF_CENTER = 0.07
OFF_CENTER = (0.14, 0.30)


@dataclass(frozen=True)
class Verdict:
    """What the judge sees: a scene, or None and the reason why there is none."""

    scene: Scene | None
    reason: str = ""

    def mistakes(self, wanted: Scene) -> list[str]:
        """Names of the attributes that differ from the wanted ones; the reason if none is seen."""
        if self.scene is None:
            return [self.reason]
        seen = vars(self.scene)
        return [name for name, value in vars(wanted).items() if seen[name] != value]


class _RejectedError(Exception):
    """The picture is not one flat shape on a flat background."""


def judge(image: Image.Image) -> Verdict:
    """Look at an RGB picture of any size."""
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
    try:
        return Verdict(_see(pixels))
    except _RejectedError as rejection:
        return Verdict(None, str(rejection))


def _see(pixels: Pixels) -> Scene:
    border = np.concatenate(
        [strip.reshape(-1, 3) for strip in (pixels[:2], pixels[-2:], pixels[:, :2], pixels[:, -2:])]
    )
    flat_background = np.median(border, axis=0)
    background = _colour_name(flat_background, "background")
    flat_colour = _foreground(pixels, background)
    colour = _colour_name(flat_colour, "shape")
    coverage = _coverage(pixels, flat_background, flat_colour)
    mask = _fine_mask(coverage)
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    top, bottom = int(rows[0]), int(rows[-1]) + 1
    left, right = int(columns[0]), int(columns[-1]) + 1
    extent = max(bottom - top, right - left)
    contrast = float(np.linalg.norm(flat_colour - flat_background))
    flat = max(0.1, FLAT_DISTANCE / contrast)
    num_blended = int(np.sum((coverage > flat) & (coverage < 1 - flat)))
    if num_blended > MAX_BLENDED_PER_EXTENT * extent / FINENESS:
        raise _RejectedError("blurred")
    height, width = mask.shape
    return Scene(
        size=_size(extent / min(height, width)),
        colour=colour,
        shape=_shape(mask[top:bottom, left:right]),
        position=_position((left + right) / 2 / width - 0.5, (top + bottom) / 2 / height - 0.5),
        background=background,
    )


def _distances(pixels: Pixels) -> Pixels:
    """Distance to each palette colour, `[..., len(PALETTE)]`."""
    palette = np.array(list(PALETTE.values()), dtype=np.float32)
    distances: Pixels = np.linalg.norm(pixels[..., None, :] - palette, axis=-1)
    return distances


def _colour_name(colour: Pixels, what: str) -> str:
    distances = _distances(colour)
    if distances.min() > MAX_COLOUR_DISTANCE:
        raise _RejectedError(f"{what} of no known colour")
    return list(PALETTE)[int(distances.argmin())]


def _foreground(pixels: Pixels, background: str) -> Pixels:
    """The flat colour of the shape: the commonest palette colour beside the background's."""
    nearest = _distances(pixels).argmin(axis=-1)
    counts = np.bincount(nearest.ravel(), minlength=len(PALETTE))
    counts[list(PALETTE).index(background)] = 0
    if counts.max() == 0:
        raise _RejectedError("nothing on the background")
    colour: Pixels = np.median(pixels[nearest == counts.argmax()], axis=0)
    return colour


def _coverage(pixels: Pixels, background: Pixels, colour: Pixels) -> Pixels:
    """Share of the shape's colour in each pixel, `[H, W]`, 0 to 1."""
    axis = colour - background
    coverage: Pixels = ((pixels - background) @ axis / np.dot(axis, axis)).clip(0, 1)
    blend = background + coverage[..., None] * axis
    dirt = np.linalg.norm(pixels - blend, axis=-1) > MAX_BLEND_DISTANCE
    if dirt.mean() > MAX_DIRT_FRACTION:
        raise _RejectedError("more than two colours")
    return coverage


def _fine_mask(coverage: Pixels) -> Mask:
    """Where the shape is, on a grid `FINENESS` times finer: small stars have few pixels."""
    height, width = coverage.shape
    fine = Image.fromarray(coverage).resize((width * FINENESS, height * FINENESS))
    return np.asarray(fine) > 0.5


def _size(extent: float) -> str:
    for size, (low, high) in EXTENTS.items():
        if low <= extent <= high:
            return size
    raise _RejectedError("neither small nor large")


@cache
def _ideal(shape: str) -> tuple[float, float, float]:
    """Root of the area and centroid below the middle, both for radius 1; width over height."""
    drawn = mask_at(shape, 128, 128, 90, 256, 256) / 255.0
    rows, columns = np.flatnonzero(drawn.any(axis=1)), np.flatnonzero(drawn.any(axis=0))
    below = np.average(np.arange(256) + 0.5 - 128, weights=drawn.sum(axis=1)) / 90
    return float(np.sqrt(drawn.sum())) / 90, float(below), len(columns) / len(rows)


def _shape(mask: Mask) -> str:
    """The ideal shape that overlaps most (intersection over union) with the mask, cropped to its box.

    Ideals are laid over the mask by area and centroid, which a rounded corner hardly changes.
    """
    height, width = mask.shape
    margin = max(height, width) // 4
    padded = np.pad(mask, margin)
    y, x = (float(axis.mean()) + 0.5 for axis in np.nonzero(padded))
    root_of_area = float(np.sqrt(mask.sum()))
    overlaps = {}
    for shape in SHAPES:
        root_of_ideal_area, below, _ = _ideal(shape)
        radius = root_of_area / root_of_ideal_area
        ideal = mask_at(shape, x, y - below * radius, radius, padded.shape[1], padded.shape[0]) > 127
        overlaps[shape] = float(np.sum(padded & ideal) / np.sum(padded | ideal))
    best, second = sorted(SHAPES, key=lambda shape: overlaps[shape], reverse=True)[:2]
    if overlaps[best] < MIN_OVERLAP or overlaps[best] - overlaps[second] < MIN_OVERLAP_MARGIN:
        raise _RejectedError("no known shape")
    if not 1 / MAX_STRETCH <= width / height / _ideal(best)[2] <= MAX_STRETCH:
        raise _RejectedError("stretched")
    return best


def _position(right_of_middle: float, below_middle: float) -> str:
    low, high = OFF_CENTER
    if max(abs(right_of_middle), abs(below_middle)) <= MAX_OFF_CENTER:
        return "center"
    if abs(below_middle) <= MAX_OFF_CENTER and low <= abs(right_of_middle) <= high:
        return "right" if right_of_middle > 0 else "left"
    if abs(right_of_middle) <= MAX_OFF_CENTER and low <= abs(below_middle) <= high:
        return "bottom" if below_middle > 0 else "top"
    raise _RejectedError("at no known position")
