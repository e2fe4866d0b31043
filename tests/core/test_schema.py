"""What a model takes, as JSON Schema."""

from __future__ import annotations

import dataclasses

import pytest

from safelight.core.params import SamplingParams
from safelight.core.schema import ModelSchema, ModelTaskType

SCHEMA = ModelSchema("m", "P", ModelTaskType.TI2I, SamplingParams, {"n": 1, "height": 64}, 16, num_input_images=(1, 3))


def test_it_has_the_models_own_defaults_multiples_and_counts():
    described = SCHEMA.json_schema()
    assert (described["title"], described["description"]) == ("P", "Parameters of m (TI2I)")
    properties = described["properties"]
    assert properties["height"]["default"] == 64 and properties["height"]["multipleOf"] == 16
    assert "default" not in properties["width"] and "multipleOf" not in properties["num_frames"]
    assert (properties["image"]["minItems"], properties["image"]["maxItems"]) == (1, 3)
    assert described["required"] == ["prompt", "image"] and described["additionalProperties"] is False


def test_what_has_a_default_is_not_required():
    assert dataclasses.replace(SCHEMA, defaults={"prompt": ""}).json_schema()["required"] == ["image"]
    assert dataclasses.replace(SCHEMA, num_input_images=(0, 3)).json_schema()["required"] == ["prompt"]


@pytest.mark.parametrize("task", ModelTaskType)
def test_a_task_says_whether_it_makes_videos(task):
    assert task.makes_video is (task in ("T2V", "I2V", "TI2V", "V2V", "TV2V"))
    assert task.lasts is (task.makes_video or task == "T2A")
