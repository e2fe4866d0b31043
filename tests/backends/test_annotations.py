"""What a client can send for a parameter: by its annotation in every way that the package writes one."""

from __future__ import annotations

import enum
import inspect
import typing
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from safelight.backends.annotations import UnaskableError, askable, members, parameters_of
from safelight.backends.diffusers import has_pipeline
from safelight.backends.signature import sorted_arguments
from safelight.core.options import NULL

Pictures = Image.Image | np.ndarray | torch.Tensor | list[Image.Image] | list[np.ndarray] | list[torch.Tensor]


class Speed(enum.Enum):
    SLOW = "slow"
    FAST = "fast"


TAKEN = {
    "float | list[float]": ("number or numbers", [0.5, 1.0], [0.5, 1.0]),
    "float | list[float] | torch.Tensor": ("number or numbers", 0.5, 0.5),
    "typing.Union[float, typing.List[float]]": ("number or numbers", (0.5,), [0.5]),
    "typing.Optional[typing.List[int]]": ("integers", [4, 6], [4, 6]),
    "typing.List[float]": ("numbers", [0.5], [0.5]),
    "typing.Tuple[int, int]": ("integers", [4, 6], (4, 6)),
    "tuple[int, int] | None": ("integers", [4, 6], (4, 6)),
    "tuple[int, ...]": ("integers", [4, 6, 8], (4, 6, 8)),
    "typing.Dict[str, Any]": ("object", {"scale": 0.5}, {"scale": 0.5}),
    "dict | None": ("object", {"a": [1]}, {"a": [1]}),
    "list[dict[str, Any]] | None": ("objects", [{"a": 1}], [{"a": 1}]),
    "list[list[float]]": ("number or numbers", [[0.5], [1]], [[0.5], [1.0]]),
    "int | list[int] | list[list[int]] | None": ("integer or integers", [[1], [2]], [[1], [2]]),
    "bool | list[bool] | None": ("boolean or booleans", [True, False], [True, False]),
    "typing.Optional[typing.Union[str, typing.List[str]]]": ("strings", ["a"], ["a"]),
    "list[str]": ("texts", ["a", "b"], ["a", "b"]),
    "typing.Literal['first', 'last']": ("string", "last", "last"),
    "Speed": ("string", "fast", Speed.FAST),
    "Image.Image": ("pictures", "a", "a"),
    "Pictures": ("pictures", ["a"], ["a"]),
    "list[Image.Image] | list[list[Image.Image]]": ("pictures", [["a"], ["b", "c"]], [["a"], ["b", "c"]]),
    "torch.Tensor | list[int] | int | None": ("integer or integers", 3, 3),
    "list[float, torch.Tensor]": ("numbers", [0.5], [0.5]),
}
REFUSED = {
    "torch.Tensor": "tensor",
    "torch.FloatTensor | None": "tensor",
    "np.ndarray": "tensor",
    "list[torch.Tensor]": "tensor",
    "torch.Generator | None": "Generator",
    "a_class_that_is_nowhere": "annotation",
}


def parameter_of(annotation: str, default: Any = None, name: str = "value"):
    namespace = {**globals(), "typing": typing, "_default": default}
    exec(f"def call(self, {name}: {annotation!r} = _default): ...", namespace)
    call = namespace["call"]
    return parameters_of(call)[name], call


@pytest.mark.parametrize("annotation", TAKEN)
def test_what_can_be_sent_is_taken_and_handed_over_as_the_call_has_it(annotation):
    kind, sent, handed = TAKEN[annotation]
    parameter, call = parameter_of(annotation)
    found = askable("value", parameter, call, {})
    assert found.option.kind == kind
    made = found.makes(found.option.check("value", sent))
    assert made == handed and type(made) is type(handed)


@pytest.mark.parametrize("annotation", REFUSED)
def test_what_cannot_is_refused_with_the_reason(annotation):
    parameter, call = parameter_of(annotation)
    with pytest.raises(UnaskableError, match=REFUSED[annotation]):
        askable("value", parameter, call, {})


@pytest.mark.parametrize(
    ("default", "kind"),
    [(0.5, "number"), (3, "integer"), (False, "boolean"), ("a", "string"), ([16, 2], "integers"), (["a"], "texts")],
    ids=str,
)
@pytest.mark.parametrize("annotation", ["a_class_that_is_nowhere", "Any"])
def test_without_an_annotation_the_default_judges(annotation, default, kind):
    parameter, call = parameter_of(annotation, default)
    option = askable("value", parameter, call, {}).option
    assert option.kind == kind and option.check("value", default) is not None
    assert option.check("value", None) is NULL, "null is another value than this default"


@pytest.mark.parametrize(
    ("name", "others", "annotation", "kind"),
    [
        ("video", (), "list[Image.Image]", "clip"),
        ("control_video", (), "Pictures", "clip"),
        ("conditioning_frames", (), "list[Pictures] | None", "clip"),
        ("mask", ("video",), "list[Pictures]", "clip"),
        ("mask", (), "list[Pictures]", "pictures"),
        ("mask_image", ("video",), "Pictures", "pictures"),
        ("image", (), "Pictures", "pictures"),
    ],
)
def test_what_is_a_clip(name, others, annotation, kind):
    parameter, call = parameter_of(annotation, name=name)
    assert askable(name, parameter, call, dict.fromkeys(others)).option.kind == kind


def test_a_picture_whose_annotation_says_tensor_is_one_where_the_package_prepares_it():
    known, unknown = sorted_arguments(diffusers.FluxFillPipeline.__call__)
    assert known["image"].option.kind == known["mask_image"].option.kind == "pictures"
    assert unknown["masked_image_latents"].startswith("it takes a tensor")
    known, unknown = sorted_arguments(diffusers.WanImageToVideoPipeline.__call__)
    assert known["last_image"].option.kind == "pictures"
    known, unknown = sorted_arguments(diffusers.EasyAnimateControlPipeline.__call__)
    assert unknown["control_video"].startswith("it takes a tensor")


def test_no_annotation_of_the_package_is_misunderstood():
    """Each of the thousands of parameters is taken, or refused with a reason; nothing is forgotten."""
    reasons = set()
    for name in filter(has_pipeline, dir(diffusers)):
        call = getattr(diffusers, name).__call__
        known, unknown = sorted_arguments(call)
        for key, each in known.items():
            each.option.takes(), each.option.json_schema()
            assert key not in unknown
        reasons |= set(unknown.values())
        for parameter in parameters_of(call).values():
            assert all(depth <= 3 for _, depth in members(parameter.annotation))
    assert len(reasons) < 20 and all(inspect.cleandoc(reason) == reason for reason in reasons)
