"""Several tasks of one model: which inputs select which, and what is refused then."""

from __future__ import annotations

import pytest

from safelight.core.options import Option
from safelight.core.package_params import PackageParams, make_params_cls
from safelight.core.params import SamplingParams
from safelight.core.schema import ModelSchema, ModelTaskType
from safelight.core.tasks import Task
from safelight.errors import InvalidParameterError

IMAGES = Option("images", "a picture")
TASKS = (
    Task("Text", (), ("prompt",), ("prompt", "height", "seed", "n", "output_type"), {"height": 64, "n": 1}),
    Task("Edit", ("image",), ("image",), ("prompt", "image", "strength", "n"), {"strength": 0.5, "n": 1}),
    Task("Steer", ("image", "control_image"), ("control_image", "image"), ("prompt", "image", "control_image")),
    Task(
        "Paint",
        ("image", "mask_image"),
        ("image", "mask_image"),
        ("prompt", "image", "mask", "mask_image", "strength"),
        {"strength": 0.9},
    ),
)


@pytest.fixture(scope="module")
def params_cls():
    own = {"mask": Option("image", "a mask"), "mask_image": IMAGES, "control_image": IMAGES}
    own["strength"] = Option("number", "how much", minimum=0.0)
    excluded = SamplingParams.options().keys() - {"prompt", "image", "height", "seed", "n", "output_type"}
    return make_params_cls("Params", own, defaults=TASKS[0].defaults, excluded=excluded, refused={}, tasks=TASKS)


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ((), "Text"),
        (("prompt", "height"), "Text"),
        (("image",), "Edit"),
        (("image", "strength"), "Edit"),
        (("mask",), "Paint"),
        (("mask_image",), "Paint"),
        (("image", "mask"), "Paint"),
        (("control_image",), "Steer"),
        (("image", "control_image"), "Steer"),
        (("image", "control_image", "mask"), "Steer"),
    ],
)
def test_inputs_select_the_task_that_takes_them_and_least_beside(params_cls, given, name):
    assert params_cls.task_of(given).pipeline_name == name
    assert params_cls.task_of(set(given)).pipeline_name == name


def test_a_class_without_tasks_selects_none():
    assert PackageParams.task_of({"image"}) is None
    assert SamplingParams.task_of({"image"}) is None and not SamplingParams.tasks_schema()


@pytest.fixture(scope="module")
def schema(params_cls):
    return ModelSchema("m", "Text", ModelTaskType.TI2I, params_cls, params_cls.defaults, 1, (0, 2))


def test_defaults_are_those_of_the_task(params_cls, schema):
    assert schema.defaults_for({"prompt": "x"}) == TASKS[0].defaults
    assert schema.defaults_for({"image": 1, "mask": 1}) == {"strength": 0.9}
    assert schema.pipeline_for({"image": 1}) == "Edit"


class Picture:
    """What a picture is here: its size."""

    width, height, size = 8, 6, (8, 6)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (
            {"strength": 0.5},
            "strength: got 0.5; it takes nothing for Text, which no picture selects; it goes with image",
        ),
        ({"image": Picture(), "height": 8}, "height: got 8; it takes nothing for Edit, which image selects"),
        (
            {"mask_image": Picture()},
            "image: got None; it takes an image, or a list of images, for Paint, which mask_image",
        ),
        (
            {"mask": Picture(), "mask_image": Picture(), "image": Picture()},
            "mask: got 'a picture'; it takes nothing, where",
        ),
        (
            {"image": Picture(), "mask": Picture(), "control_image": Picture()},
            "mask: got 'a picture'; it takes nothing for",
        ),
    ],
)
def test_what_a_task_does_not_take_or_lacks(params_cls, schema, fields, says):
    with pytest.raises(InvalidParameterError) as caught:
        params_cls(prompt="x", **fields).resolve(schema)
    assert str(caught.value).startswith(says)


def test_only_a_mask_needs_alpha(params_cls):
    assert {name: params_cls.mode_of(name) for name in ("image", "mask", "mask_image")} == {
        "image": "RGB",
        "mask": "RGBA",
        "mask_image": "RGB",
    }
