"""Parameters that no family wrote: null, rates and what a call cannot do without."""

from __future__ import annotations

import msgspec
import pytest
from PIL import Image

from safelight.core.options import NULL, Option
from safelight.core.package_params import PackageParams, make_params_cls
from safelight.core.schema import ModelSchema, ModelTaskType
from safelight.core.tasks import Task
from safelight.errors import InvalidParameterError
from safelight.runtime.messages import join_images, schema_from_wire, schema_to_wire, split_images

OWN = {
    "instruction": Option("texts", "what to do", nullable=True),
    "frame_rate": Option("number", "frames a second", nullable=True),
    "scale": Option("number or numbers", "how much"),
    "kwargs": Option("object", "whatever"),
}


def schema_of(required=(), **defaults):
    shared = {"n": 1, "output_type": "pil", "frame_rate": 25.0, "instruction": ("be brief",)}
    fields = (*OWN, "prompt", "negative_prompt", "height", "width", "num_frames", "fps", "seed", "n", "output_type")
    task = Task("SomePipeline", (), tuple(required), fields, {**shared, **defaults})
    cls = make_params_cls("Some", OWN, defaults=task.defaults, excluded={"image"}, refused={}, tasks=(task,))
    return ModelSchema("m", "SomePipeline", ModelTaskType.T2V, cls, cls.defaults, 1)


def crossed(params, schema):
    """Return parameters as another process has them, of a class that was made there."""
    wire = msgspec.msgpack.decode(msgspec.msgpack.encode(schema_to_wire(schema)), type=type(schema_to_wire(schema)))
    fields, images = split_images(params)
    return join_images(schema_from_wire(wire).params_cls, msgspec.json.decode(msgspec.json.encode(fields)), images)


@pytest.mark.parametrize("given", [{}, {"instruction": None}, {"instruction": ["a", "b"]}], ids=str)
def test_null_is_not_unset(given):
    """Here, in what is told of it, and in another process."""
    schema = schema_of()
    params = schema.params_cls.from_fields({"prompt": "x", "seed": 1, **given}).resolve(schema)
    wanted = given.get("instruction", ["be brief"])
    assert vars(params)["instruction"] == (NULL if wanted is None else tuple(wanted))
    told = params.described()
    assert "instruction" in told and told["instruction"] == (None if wanted is None else tuple(wanted))
    assert vars(crossed(params, schema)) == vars(params)
    again = schema.params_cls.from_fields(msgspec.json.decode(msgspec.json.encode(told))).resolve(schema)
    assert vars(again) == vars(params)


def test_null_is_unset_where_it_says_nothing_else():
    schema = schema_of()
    params = schema.params_cls.from_fields({"prompt": "x", "scale": None, "height": None}).resolve(schema)
    assert vars(params)["scale"] is None and "scale" not in params.described()


@pytest.mark.parametrize(("given", "fps"), [({}, 25), ({"frame_rate": 10}, 10), ({"fps": 12}, 12)], ids=str)
def test_the_files_rate_is_what_the_call_is_told(given, fps):
    schema = schema_of()
    params = schema.params_cls.from_fields({"prompt": "x", **given}).resolve(schema)
    assert params.frames_a_second() == fps
    without = {name: value for name, value in schema.defaults.items() if name != "frame_rate"}
    bare = ModelSchema("m", "SomePipeline", ModelTaskType.T2V, schema.params_cls, without, 1)
    assert schema.params_cls.from_fields({"prompt": "x"}).resolve(bare).frames_a_second() == 24


def test_a_prompt_is_required_where_the_call_requires_it_and_only_there():
    for required in ((), ("prompt",)):
        schema = schema_of(required)
        assert schema.json_schema()["required"] == list(required)
        asked = schema.params_cls.from_fields({})
        if required:
            with pytest.raises(InvalidParameterError, match=r"^prompt: got None"):
                asked.resolve(schema)
        else:
            (single,) = schema.params_cls.from_fields({"seed": 1}).resolve(schema).split()
            assert single.prompt is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("scale", "0.5"),
        ("scale", []),
        ("scale", [[[[1.0]]]]),
        ("scale", [0.5, None]),
        ("scale", float("nan")),
        ("kwargs", [1]),
        ("kwargs", {"a": float("inf")}),
        ("kwargs", {1: 2}),
        ("kwargs", {"a": {"b": {"c": {"d": {"e": {"f": {"g": {"h": {"i": 1}}}}}}}}}),
        ("kwargs", {"a": list(range(5000))}),
        ("kwargs", {"a": object()}),
        ("instruction", "a text"),
        ("instruction", [1]),
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_is_of_another_kind_is_refused_by_name(name, value):
    schema = schema_of()
    with pytest.raises(InvalidParameterError, match=f"^{name}: got "):
        schema.params_cls.from_fields({"prompt": "x", name: value}).resolve(schema)


def test_what_is_nested_is_taken():
    schema = schema_of()
    given = {"scale": [[0.5, 1], [2]], "kwargs": {"scale": 0.5, "names": ["a", None, True]}}
    params = schema.params_cls.from_fields({"prompt": "x", "seed": 1, **given}).resolve(schema)
    assert vars(params)["scale"] == ((0.5, 1.0), (2.0,)) and vars(params)["kwargs"] == given["kwargs"]
    assert vars(crossed(params, schema)) == vars(params)


def test_the_size_is_the_pictures_where_the_call_says_none():
    picture = Image.new("RGB", (80, 60))
    assert PackageParams(image=(picture,)).output_size(1) == (60, 80)
    assert PackageParams().output_size(1) == (1024, 1024)
    assert PackageParams(height=32, image=(picture,)).output_size(1) == (32, 80)
