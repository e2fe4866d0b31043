"""A comparison can see: in every case the tiny checkpoints answer to all that they are given.

It shows nothing about an input to which the pixels do not answer. So each is changed alone, and must move them by
`ANSWER`, a hundred times what parity allows. Where a reference has no answer, the recipe says why.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from safelight.core.options import Option
from safelight.core.pipeline import ComposedPipeline
from safelight.core.schema import ModelSchema
from safelight.errors import InvalidParameterError
from safelight.testing.models import TinyModels, requests, run_alone, single
from safelight.testing.recipes import Case, Recipe
from safelight.testing.suites.suite import Suite

ANSWER = 1e-2
OTHER_PROMPT, OTHER_NEGATIVE = "Two dogs run across the wet field at dawn.", "The sky is orange!"
ELSEWHERE = {
    "n": "how many outputs there are: each can be had again alone",
    "output_type": "the form of the result",
    "fps": "of the file alone",
}
"""Fields that no picture depends on, whatever the model."""
SCHEDULE = (1.0, 0.7, 0.3)
"""Of a case that gives none."""
REMEDY = "make the way of it into the model stronger by `gains` of the recipe, or find what does not read it"


class AnswersSuite(Suite):
    """What moves the pixels."""

    def test_every_case_answers(self, recipe: Recipe, case: Case, tiny_models: TinyModels) -> None:
        """To another seed, prompt, negative prompt and image."""
        pipeline, fields = tiny_models.ours(recipe, case.variant), single(case)
        changes = {"seed": {"seed": fields.get("seed", 0) + 1000}, "prompt": {"prompt": OTHER_PROMPT}}
        if fields.get("negative_prompt") is not None:
            changes["negative prompt"] = {"negative_prompt": OTHER_NEGATIVE}
        given = fields.get("image", [])
        images = given if isinstance(given, list) else [given]
        for index, image in enumerate(images):
            changes[f"image {index + 1}"] = {"image": [*images[:index], inverted(image), *images[index + 1 :]]}
        if len(images) > 1:
            changes["order of images"] = {"image": [*images[1:], images[0]]}
        made = pixels(pipeline, fields)
        moved = {name: movement(made, pixels(pipeline, {**fields, **change})) for name, change in changes.items()}
        silent = {name for name, distance in moved.items() if distance < ANSWER}
        assert silent == set(case.unanswered), f"{REMEDY}: {moved}"

    def test_every_field_answers_in_some_case(self, recipe: Recipe, tiny_models: TinyModels) -> None:
        """Those that the case gives come first; a field that answers in none is in the recipe's list, alone."""
        options = tiny_models.ours(recipe).schema.options()
        cases = [case for case in recipe.cases if not case.slow]
        silent, made = set(), dict[str, Tensor]()
        for name, option in options.items():
            if name in ELSEWHERE:
                continue
            ordered = sorted(cases, key=lambda case: name not in case.fields)
            if not any(answers(tiny_models.ours(recipe, case.variant), case, name, option, made) for case in ordered):
                silent.add(name)
        assert silent == set(recipe.silent), REMEDY

    def test_another_order_of_words_is_another_prompt(self, recipe: Recipe, tiny_models: TinyModels) -> None:
        """Positions count: an encoder that saw a bag of words would pass with any two prompts of unlike words."""
        case = recipe.cases[0]
        pipeline, fields = tiny_models.ours(recipe, case.variant), single(case)
        words = "a red cat on an old map"
        turned = " ".join(words.split()[::-1])
        made = [pixels(pipeline, {**fields, "prompt": prompt}) for prompt in (words, turned)]
        assert torch.isfinite(made[0]).all() and movement(made[0], made[1]) >= ANSWER / 10


def inverted(image: Image.Image) -> Image.Image:
    """Return a picture of other colours; its transparency, if it has any, stays."""
    bands = image.split()
    return Image.merge(image.mode, [*(band.point(lambda value: 255 - value) for band in bands[:3]), *bands[3:]])


def pixels(pipeline: ComposedPipeline, fields: Mapping[str, Any]) -> Tensor:
    """Return what the first output of a request is."""
    return run_alone(pipeline, requests(pipeline, fields)[0]).float()


def movement(first: Tensor, second: Tensor) -> float:
    """Return the largest difference between two pictures; one of another size is another picture."""
    return float((first - second).abs().max()) if first.shape == second.shape else 1.0


def other_values(schema: ModelSchema, name: str, option: Option, value: Any) -> list[Any]:
    """Return other values of a field, not all of which the model must take; none where there is nothing to change."""
    maximum = math.inf if option.maximum is None else option.maximum
    if option.choices:
        return list(option.choices)
    match option.kind:
        case "string" | "strings":
            return [OTHER_NEGATIVE if name.startswith("negative") else OTHER_PROMPT]
        case "boolean":
            return [not value]
        case "image" | "images":
            return other_pictures(value)
        case "numbers":
            return [[0.97 * number for number in value]]
        case "number":
            return [min(2.0 * (value or 0.0) + 1.0, maximum), option.minimum]
        case "integer":
            steps = {"height": schema.size_multiple, "width": schema.size_multiple, "num_frames": schema.frame_step}
            number = value or 0
            return [number + 2 * steps.get(name, 1), min(2 * number, maximum), option.minimum]
    raise AssertionError(f"no other value is known of a field of kind {option.kind}")


def other_pictures(value: Any) -> list[Any]:
    """Return the negatives of pictures, if there are any."""
    if value is None:
        return []
    return [[inverted(image) for image in value] if isinstance(value, list) else inverted(value)]


def answers(pipeline: ComposedPipeline, case: Case, name: str, option: Option, made: dict[str, Tensor]) -> bool:
    """Say whether a field moves the pixels of a case, `made` if they are; False where the case cannot have it."""
    fields = single(case)
    value = fields.get(name, pipeline.schema.defaults.get(name))
    if option.kind == "numbers":  # a schedule, which says itself how many steps there are
        value = value or SCHEDULE
        made, fields = {}, {**fields, name: value, "num_inference_steps": None}
    for other in other_values(pipeline.schema, name, option, value):
        if other is None or other == value:
            continue
        if case.name not in made:
            made[case.name] = pixels(pipeline, fields)
        with suppress(InvalidParameterError):
            if movement(made[case.name], pixels(pipeline, {**fields, name: other})) >= ANSWER:
                return True
    return False
