"""What goes between the two processes comes out as it went in: schemas, parameters, images."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import msgspec
import numpy as np
import pytest
from PIL import Image

from safelight.core.architecture import Architecture
from safelight.core.options import Option
from safelight.core.package_params import make_params_cls
from safelight.core.registry import pipelines
from safelight.core.schema import ModelSchema, ModelTaskType
from safelight.core.stage_memory import StageMemory
from safelight.core.tasks import Task
from safelight.runtime.messages import (
    WireSchema,
    array_to_image,
    described_image,
    image_to_array,
    join_images,
    schema_from_wire,
    schema_to_wire,
    split_images,
)

FAMILY = next(name for name, entry in pipelines().items() if "image" in entry.sampling_param_cls().options())


def schema_of(pipeline_name, params_cls):
    return ModelSchema(
        model="m",
        pipeline_name=pipeline_name,
        task=ModelTaskType.T2I,
        params_cls=params_cls,
        defaults={"height": 64, "num_inference_steps": 3},
        size_multiple=16,
        num_input_images=(0, 2),
        notes=("slow",),
        capabilities=frozenset({"b", "a"}),
        solvers={"euler": ("sigmas", "timesteps"), "unipc": ()},
        architecture=Architecture(8, 32),
        device_bytes=5,
        stage_memory=(StageMemory("decoding", 1, 2, 3),),
    )


def crossed(schema):
    """Return a schema after its way as JSON, as a client of the server has it."""
    return schema_from_wire(msgspec.convert(json.loads(msgspec.json.encode(schema_to_wire(schema))), WireSchema))


def test_a_familys_schema_is_the_same_in_the_other_process():
    schema = schema_of(FAMILY, pipelines()[FAMILY].sampling_param_cls())
    assert crossed(schema) == schema


def test_parameters_that_no_family_wrote_are_made_again():
    own = {"strength": Option("number", "How much changes.", minimum=0.0)}
    given: dict[str, Any] = {
        "defaults": {"strength": 0.5},
        "excluded": frozenset({"fps"}),
        "refused": {"generator": "seed"},
        "tasks": (Task("SomebodysPipeline", (), ("prompt",), ("prompt", "strength"), {"strength": 0.5}),),
    }
    params_cls = make_params_cls("Foreign", own, **given)
    found = crossed(schema_of("SomebodysPipeline", params_cls))
    assert found.params_cls.options() == params_cls.options() and found.params_cls.__name__ == "Foreign"
    assert {name: vars(found.params_cls)[name] for name in given} == given


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
def test_images_keep_their_fields_and_pixels(mode):
    params_cls = pipelines()[FAMILY].sampling_param_cls()
    pictures = tuple(Image.effect_noise((8, 6 + index), 90).convert(mode) for index in range(2))
    params = params_cls(prompt="x", image=pictures, seed=1)
    fields, images = split_images(params)
    assert "image" not in fields and [each[:2] for each in images] == [("image", (0,)), ("image", (1,))]
    sent = [(described_image(*each), image_to_array(each[2]).tobytes()) for each in images]
    made = [(about.param, about.place, array_to_image(data, about)) for about, data in sent]
    again = join_images(params_cls, fields, made)
    assert again.image is not None
    assert [np.array(each).tolist() for each in again.image] == [np.array(each).tolist() for each in pictures]
    assert dataclasses.replace(again, image=None) == dataclasses.replace(params, image=None)
