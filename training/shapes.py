"""The world that the model learns: scenes, their prompts and their pictures.

A scene is one flat shape on a flat background. Imports numpy and pillow only, so that tests can
use it without torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (225, 30, 35),
    "green": (30, 160, 60),
    "blue": (30, 75, 220),
    "yellow": (250, 220, 40),
    "purple": (140, 45, 175),
    "orange": (250, 130, 20),
    "white": (255, 255, 255),
    "black": (0, 0, 0),
}
SIZES = ("small", "large")
SHAPES = ("circle", "square", "triangle", "star")
# Centre of the shape as a fraction of width and height.
POSITIONS: dict[str, tuple[float, float]] = {
    "left": (0.28, 0.5),
    "right": (0.72, 0.5),
    "top": (0.5, 0.28),
    "bottom": (0.5, 0.72),
    "center": (0.5, 0.5),
}
# Radius as a fraction of the picture's shorter side; jitter is uniform in plus or minus this.
RADII = {"small": 0.11, "large": 0.21}
RADIUS_JITTER = 0.02
POSITION_JITTER = 0.004

SUPERSAMPLING = 4
SPLIT_SEED = 20
HELD_OUT_FRACTION = 0.1
DEFAULT_PROMPT_FRACTION = 0.65

SYNONYMS: dict[str, tuple[str, ...]] = {
    "small": ("little", "tiny"),
    "large": ("big", "huge"),
    "circle": ("disc", "disk", "round"),
    "center": ("middle", "centre"),
}

Mask = NDArray[np.uint8]


@dataclass(frozen=True)
class Scene:
    """One of the 2240 combinations. `colour` and `background` differ."""

    size: str
    colour: str
    shape: str
    position: str
    background: str


def all_scenes() -> list[Scene]:
    """Every scene, in a fixed order."""
    return [
        Scene(size, colour, shape, position, background)
        for size, colour, background, shape, position in product(SIZES, PALETTE, PALETTE, SHAPES, POSITIONS)
        if colour != background
    ]


def split_scenes() -> tuple[list[Scene], list[Scene]]:
    """Scenes to train on, and the tenth that training never sees."""
    scenes = all_scenes()
    order = np.random.default_rng(SPLIT_SEED).permutation(len(scenes))
    num_held_out = round(HELD_OUT_FRACTION * len(scenes))
    held_out = [scenes[index] for index in order[:num_held_out]]
    return [scenes[index] for index in order[num_held_out:]], held_out


def prompt_for(scene: Scene) -> str:
    """The default form of the prompt."""
    return f"a {scene.size} {scene.colour} {scene.shape} at the {scene.position} on a {scene.background} background"


def varied_prompt_for(
    scene: Scene, generator: np.random.Generator, default_fraction: float = DEFAULT_PROMPT_FRACTION
) -> str:
    """The default form most of the time, else what people may type instead."""
    if generator.random() < default_fraction:
        return prompt_for(scene)

    def word(name: str) -> str:
        return str(generator.choice((name, *SYNONYMS.get(name, ()))))

    size, shape, position = word(scene.size), word(scene.shape), word(scene.position)
    article = "an" if scene.background == "orange" and generator.random() < 0.8 else "a"
    preposition = generator.choice(("at the", "in the", "on the", "at", "to the"))
    first = generator.choice(("a ", "a ", "one ", "the ", "an image of a ", "a picture of a ", ""))
    subject = f"{first}{size} {scene.colour} {shape}"
    comma = "," if generator.random() < 0.2 else ""
    where = f"{comma} {preposition} {position}"
    against = str(
        generator.choice(
            (
                f"{comma} on {article} {scene.background} background",
                f"{comma} on {article} {scene.background} background",
                f"{comma} on {scene.background} background",
                f"{comma} {scene.background} background",
                f"{comma} against {article} {scene.background} background",
                f"{comma} on {scene.background}",
            )
        )
    )
    text = subject + (where + against if generator.random() < 0.8 else against + where)
    return _varied_writing(text, generator)


def _varied_writing(text: str, generator: np.random.Generator) -> str:
    """Capitals and a closing period, which the tokenizers keep apart."""
    style = generator.random()
    if style < 0.25:
        text = text[:1].upper() + text[1:]
    elif style < 0.33:
        text = text.upper()
    elif style < 0.4:
        text = text.title()
    return text + "." if generator.random() < 0.3 else text


def _outline(shape: str, x: float, y: float, radius: float) -> list[tuple[float, float]]:
    """Corners of a polygon of about the same visual size as a circle of `radius`, in pixels."""
    if shape == "square":
        half = 0.88 * radius
        return [(x - half, y - half), (x + half, y - half), (x + half, y + half), (x - half, y + half)]
    if shape == "triangle":
        y += 0.3 * radius  # so that the middle of its bounding box is at (x, y)
        reaches = [1.2 * radius] * 3
    else:
        reaches = [1.12 * radius, 0.46 * radius] * 5
    turn = 2 * math.pi / len(reaches)
    return [
        (x + reach * math.sin(turn * corner), y - reach * math.cos(turn * corner))
        for corner, reach in enumerate(reaches)
    ]


def draw_mask(
    shape: str,
    size: str,
    position: str,
    generator: np.random.Generator,
    width: int = 128,
    height: int = 128,
) -> Mask:
    """Coverage of each pixel by the shape, 0 to 255, `[height, width]`, jittered by `generator`."""
    jitter_x, jitter_y, jitter_radius = generator.uniform(-1, 1, 3)
    shorter = min(width, height)
    x = POSITIONS[position][0] * width + POSITION_JITTER * jitter_x * shorter
    y = POSITIONS[position][1] * height + POSITION_JITTER * jitter_y * shorter
    radius = RADII[size] * shorter * (1 + RADIUS_JITTER * jitter_radius)
    return mask_at(shape, x, y, radius, width, height)


def mask_at(shape: str, x: float, y: float, radius: float, width: int, height: int) -> Mask:
    """Coverage of each pixel by a shape whose middle and radius are given in pixels."""
    fine = Image.new("L", (width * SUPERSAMPLING, height * SUPERSAMPLING), 0)
    x, y, radius = x * SUPERSAMPLING, y * SUPERSAMPLING, radius * SUPERSAMPLING
    pen = ImageDraw.Draw(fine)
    if shape == "circle":
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
    else:
        pen.polygon(_outline(shape, x, y, radius), fill=255)
    return np.asarray(fine.reduce(SUPERSAMPLING))


def draw(scene: Scene, generator: np.random.Generator, width: int = 128, height: int = 128) -> Image.Image:
    """The picture of a scene, RGB."""
    mask = draw_mask(scene.shape, scene.size, scene.position, generator, width, height)
    coverage = mask[..., None].astype(np.float32) / 255
    colour = np.array(PALETTE[scene.colour], dtype=np.float32)
    background = np.array(PALETTE[scene.background], dtype=np.float32)
    pixels = background + coverage * (colour - background)
    return Image.fromarray(pixels.round().astype(np.uint8))
