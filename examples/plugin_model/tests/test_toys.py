"""The toy models keep what every family promises. Nothing else runs them, so that there is no parity to be tested."""

from __future__ import annotations

from PIL import Image
from toy_models.make_checkpoint import write_checkpoint

from safelight.testing.recipes import Case, Recipe
from safelight.testing.suites import StandaloneSuite

SMALL = {"height": 32, "width": 48, "num_inference_steps": 4}
TALL = {"height": 72, "width": 40, "num_inference_steps": 3, "negative_prompt": "blurry"}
PHOTO = Image.effect_noise((70, 50), 80).convert("RGB")

TOY = Recipe(
    "ToyPipeline",
    lambda folder, variant: write_checkpoint(folder, "ToyPipeline"),
    cases=(
        Case("small", {"prompt": "a cat", **SMALL}),
        Case("tall, negative prompt", {"prompt": "two dogs", **TALL}),
    ),
)
TOY_VARIATION = Recipe(
    "ToyVariationPipeline",
    lambda folder, variant: write_checkpoint(folder, "ToyVariationPipeline"),
    cases=(
        Case("small", {"prompt": "a cat", "image": PHOTO, **SMALL}),
        Case("tall, weaker", {"prompt": "two dogs", "image": PHOTO, **TALL, "strength": 0.8}),
    ),
)


class TestToys(StandaloneSuite):
    recipes = (TOY, TOY_VARIATION)
