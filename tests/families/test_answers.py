"""Parity can see: in every case the tiny checkpoints answer to all that they are given.

A comparison shows nothing about an input to which the pixels do not answer. So each is changed alone, and must move
them by `ANSWER`, a hundred times what parity allows. Where a reference has no answer, the recipe says why.
"""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image

from safelight.errors import InvalidParameterError
from tests.families.conftest import requests
from tests.families.test_parity import run_alone

ANSWER = 1e-2
OTHER_PROMPT, OTHER_NEGATIVE = "Two dogs run across the wet field at dawn.", "The sky is orange!"
QUICK_CASES = 2
"""Of each recipe, in `make test`."""
SLOW_RECIPES = {
    "test_every_field_answers_in_some_case": (
        "FluxKontextPipeline",
        "QwenImageEditPlusPipeline",
        "QwenImageLayeredPipeline",
        "WanImageToVideoPipeline",
    )
}
"""Whose own fields are for `make test-all`: they have the most."""
ELSEWHERE = {
    "n": "how many outputs there are: each can be had again alone",
    "output_type": "the form of the result",
    "fps": "of the file alone",
}
"""Fields that no picture depends on, whatever the model."""
INTEGERS = {"max_sequence_length": 78, "resolution": 1024}
"""Other values of fields for which a step more is no other value."""


def inverted(image):
    """Return a picture of other colours; its transparency, if it has any, stays."""
    bands = image.split()
    return Image.merge(image.mode, [*(band.point(lambda value: 255 - value) for band in bands[:3]), *bands[3:]])


def single(case):
    """Return a case's fields for one output."""
    prompt = case.fields.get("prompt")
    return {**case.fields, "prompt": prompt[0] if isinstance(prompt, list) else prompt, "n": 1}


def pixels(pipeline, fields):
    return run_alone(pipeline, requests(pipeline, fields)[0]).float()


def movement(first, second):
    """Return the largest difference between two pictures; one of another size is another picture."""
    return float((first - second).abs().max()) if first.shape == second.shape else 1.0


def test_every_case_answers(recipe, case, models):
    pipeline, fields = models.ours(recipe, case.variant), single(case)
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
    assert {name for name, distance in moved.items() if distance < ANSWER} == set(case.unanswered), moved


def changed(schema, name, option, fields):
    """Return a case's fields with one of them changed; None where there is nothing to change."""
    value = fields.get(name, schema.defaults.get(name))
    other: Any
    match option.kind:
        case "string" | "strings":
            other = OTHER_NEGATIVE if name.startswith("negative") else OTHER_PROMPT
        case "boolean":
            other = not value
        case "image" | "images":
            if value is None:
                return None
            other = [inverted(image) for image in value] if isinstance(value, list) else inverted(value)
        case "numbers":
            other = [0.97 * number for number in value or (1.0, 0.7, 0.3)]
        case "number":
            other = 2.0 * (value or 0.0) + 1.0
        case "integer" if name in INTEGERS:
            other = INTEGERS[name]
        case "integer":
            step = {"height": schema.size_multiple, "width": schema.size_multiple, "num_frames": schema.frame_step}
            other = 2 * value if name == "max_area" else (value or 0) + 2 * step.get(name, 1)
    steps = {"num_inference_steps": None} if name in ("sigmas", "timesteps") else {}
    return {**fields, name: other, **steps}


def answers(pipeline, case, name, option, made):
    """Say whether a field moves the pixels of a case, `made` if they are; False where the case cannot have it."""
    fields = single(case)
    other = changed(pipeline.schema, name, option, fields)
    if other is None:
        return False
    if name in ("sigmas", "timesteps"):
        made, fields = {}, {**fields, name: fields.get(name, (1.0, 0.7, 0.3)), "num_inference_steps": None}
    if case.name not in made:
        made[case.name] = pixels(pipeline, fields)
    try:
        return movement(made[case.name], pixels(pipeline, other)) >= ANSWER
    except InvalidParameterError:
        return False


def test_every_field_answers_in_some_case(recipe, models):
    """Those that the case gives come first; a field that answers in none is in the recipe's list, and nothing else."""
    options = models.ours(recipe).schema.params_cls.options()
    cases = [case for case in recipe.cases if not case.slow]
    silent, made = set(), dict[str, torch.Tensor]()
    for name, option in options.items():
        if name in ELSEWHERE:
            continue
        ordered = sorted(cases, key=lambda case: name not in case.fields)
        if not any(answers(models.ours(recipe, case.variant), case, name, option, made) for case in ordered):
            silent.add(name)
    assert silent == set(recipe.silent)


def test_another_order_of_words_is_another_prompt(recipe, models):
    """Positions count: an encoder that saw a bag of words would pass with any two prompts of unlike words."""
    case = recipe.cases[0]
    pipeline, fields = models.ours(recipe, case.variant), single(case)
    words = "a red cat on an old map"
    turned = " ".join(words.split()[::-1])
    made = [pixels(pipeline, {**fields, "prompt": prompt}) for prompt in (words, turned)]
    assert torch.isfinite(made[0]).all() and movement(*made) >= ANSWER / 10
