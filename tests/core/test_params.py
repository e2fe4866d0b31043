"""What may be asked: types, ranges, names, defaults, and how they are described."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from safelight.core.params import MAX_SEED, SamplingParams
from safelight.core.schema import ModelSchema, ModelTaskType
from safelight.errors import InvalidParameterError, UnknownParameterError
from safelight.preparation import prepare
from tests.recipes import own_pipelines

ALL_PARAMS = [entry.sampling_param_cls() for entry in own_pipelines().values()]


def schema_of(params_cls, **changes):
    schema = ModelSchema(
        model="test",
        pipeline_name="Test",
        task=ModelTaskType.T2I,
        params_cls=params_cls,
        defaults={**params_cls.defaults, **taken(params_cls, height=64, width=96)},
        size_multiple=16,
        num_input_images=(0, 1),
    )
    return dataclasses.replace(schema, **changes)


@pytest.fixture(params=ALL_PARAMS, ids=lambda cls: cls.__name__)
def params_cls(request):
    return request.param


ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.sampled_from([10**400, -(10**400), 1e308, 16, 64, "pil", "", "\ud800", b"x", Image.new("RGB", (64, 96))])
    | st.floats()
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=4,
)


@settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_value_is_taken_or_refused_by_name(params_cls, data):
    names = data.draw(st.lists(st.sampled_from(sorted(params_cls.options())), min_size=1, max_size=3, unique=True))
    try:
        schema = schema_of(params_cls, num_input_images=(1, 3))
        params, _ = prepare(schema, complete(params_cls, {name: data.draw(ANYTHING) for name in names}))
    except InvalidParameterError as error:
        assert error.param in params_cls.options()
    else:
        assert json.dumps(params.described())
        assert params.num_branches() in (1, 2) and params.num_steps() >= 0


def complete(params_cls, fields):
    image = {"image": Image.new("RGB", (64, 96))} if "image" in params_cls.options() else {}
    return {"prompt": "a cat", **image, **fields}


def resolved(params_cls, **fields):
    return params_cls.from_fields(complete(params_cls, fields)).resolve(schema_of(params_cls))


def taken(params_cls, **fields):
    """Return those fields that the model takes: some take no size."""
    return {name: value for name, value in fields.items() if name in params_cls.options()}


def test_unset_stays_unset_until_resolved(params_cls):
    assert params_cls(prompt="x").set_fields() == {"prompt": "x"}
    for name, value in schema_of(params_cls).defaults.items():
        assert vars(resolved(params_cls))[name] == ("a cat" if name == "prompt" else value)


def test_what_is_set_wins_over_defaults_and_resolving_twice_changes_nothing(params_cls):
    fields = taken(params_cls, height=32, seed=3, num_inference_steps=7)
    once = resolved(params_cls, **fields)
    assert taken(params_cls, **vars(once)).items() >= taken(params_cls, width=96, **fields).items()
    assert once.resolve(schema_of(params_cls)) == once


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("prompt", 3),
        ("prompt", []),
        ("prompt", ["a", 2]),
        ("prompt", "x" * 8193),
        ("prompt", "lone \ud800 surrogate"),
        ("negative_prompt", ["one", "two"]),
        ("height", 0),
        ("height", -64),
        ("height", 64.5),
        ("height", "64"),
        ("height", True),
        ("width", 10**9),
        ("num_inference_steps", 0),
        ("num_inference_steps", 2.5),
        ("num_inference_steps", 10**9),
        ("guidance_scale", -1.0),
        ("guidance_scale", math.nan),
        ("guidance_scale", math.inf),
        ("guidance_scale", "3"),
        ("guidance_scale", True),
        ("seed", -1),
        ("seed", 2**64),
        ("seed", 1.5),
        ("n", 0),
        ("n", -1),
        ("n", 10**7),
        ("output_type", "exe"),
    ],
)
def test_a_bad_value_is_refused_by_name(params_cls, name, value):
    if name in params_cls.excluded:
        return
    with pytest.raises(InvalidParameterError) as caught:
        resolved(params_cls, **{name: value})
    assert caught.value.param == name
    assert str(caught.value).startswith(f"{name}: got ") and "it takes " in str(caught.value)


def test_numpy_numbers_are_numbers(params_cls):
    given = taken(params_cls, seed=np.uint32(5), n=np.int64(2), guidance_scale=np.float32(2.0))
    params = vars(resolved(params_cls, **given))
    plain = taken(params_cls, seed=5, n=2, guidance_scale=2.0)
    assert [(params[name], type(params[name])) for name in plain] == [
        (plain[name], type(plain[name])) for name in plain
    ]


@pytest.mark.parametrize("value", [3.0, np.float32(3.0), 3])
def test_a_number_is_whole_if_its_value_is(params_cls, value):
    params = resolved(params_cls, seed=value)
    assert params.seed == 3 and type(params.seed) is int


def test_sizes_name_the_multiple_and_the_nearest():
    params_cls = next(cls for cls in ALL_PARAMS if not cls.fits_size)
    with pytest.raises(InvalidParameterError, match=r"height: got 65; it takes a multiple of 16; nearest: 64 and 80"):
        resolved(params_cls, height=65)
    with pytest.raises(InvalidParameterError, match=r"width: got 7; it takes a multiple of 16; nearest: 16"):
        resolved(params_cls, width=7)


def test_the_last_seed_fits(params_cls):
    assert resolved(params_cls, seed=MAX_SEED, n=1).seed == MAX_SEED
    with pytest.raises(InvalidParameterError, match="seed: got"):
        resolved(params_cls, seed=MAX_SEED, n=2)


def test_unknown_names_suggest_the_nearest(params_cls):
    with pytest.raises(UnknownParameterError, match="did you mean 'output_type'"):
        params_cls.from_fields({"ouptut_type": "pil"})
    with pytest.raises(UnknownParameterError, match="known are "):
        params_cls.from_fields({"zzzzzz": 64})


@pytest.mark.parametrize("name", ["generator", "return_dict", "callback_on_step_end", "latents", "prompt_embeds"])
def test_arguments_of_diffusers_are_refused_with_our_way(params_cls, name):
    with pytest.raises(UnknownParameterError) as caught:
        params_cls.from_fields({name: None})
    assert params_cls.refused[name] in str(caught.value)


def test_excluded_fields_are_refused_and_not_offered(params_cls):
    for name in params_cls.excluded:
        assert name not in params_cls.options()
        with pytest.raises(UnknownParameterError):
            params_cls.from_fields({name: 1})


def test_aliases_are_understood_but_not_twice(params_cls):
    assert params_cls.from_fields({"num_images_per_prompt": 2}).n == 2
    with pytest.raises(InvalidParameterError, match="one value"):
        params_cls.from_fields({"num_images_per_prompt": 2, "n": 2})


def test_split_gives_every_prompt_the_same_seeds(params_cls):
    params = resolved(params_cls, prompt=["a", "b"], seed=5, n=2)
    assert [(p.prompt, p.seed, p.n) for p in params.split()] == [("a", 5, 1), ("a", 6, 1), ("b", 5, 1), ("b", 6, 1)]
    if "negative_prompt" in params_cls.options():
        each = resolved(params_cls, prompt=["a", "b"], negative_prompt=["c", "d"], seed=5, n=2)
        assert [p.negative_prompt for p in each.split()] == ["c", "c", "d", "d"]
        shared = resolved(params_cls, prompt=["a", "b"], negative_prompt="c", seed=0)
        assert [p.negative_prompt for p in shared.split()] == ["c", "c"]


def test_the_number_of_images_is_checked():
    for params_cls in ALL_PARAMS:
        if "image" in params_cls.options():
            with pytest.raises(InvalidParameterError, match="image: got '2 images'; it takes 0 to 1"):
                resolved(params_cls, image=("a", "b"))
            required = schema_of(params_cls, num_input_images=(1, 2))
            with pytest.raises(InvalidParameterError, match="image: got '0 images'; it takes 1 to 2"):
                params_cls(prompt="x").resolve(required)


def test_json_schema_says_what_resolve_does(params_cls):
    schema = schema_of(params_cls)
    described = schema.json_schema()
    assert described["additionalProperties"] is False
    assert described["required"] == ([] if "prompt" in schema.defaults else ["prompt"])
    assert set(described["properties"]) == set(params_cls.options()) - {"scheduler"}, "none can be chosen"
    for name, entry in described["properties"].items():
        assert entry["description"] and entry["x-group"] in ("basic", "advanced")
        assert entry.get("default") == schema.defaults.get(name)
        for bound in ("minimum", "maximum"):
            if bound in entry and entry.get("type") == "integer" and name not in ("height", "width", "seed"):
                outside = entry[bound] + (1 if bound == "maximum" else -1)
                with pytest.raises(InvalidParameterError):
                    resolved(params_cls, **{name: outside})
    for name in taken(params_cls, height=None, width=None):
        assert ("multipleOf" in described["properties"][name]) is not params_cls.fits_size


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SamplingParams(prompt="x").prompt = "y"  # type: ignore[misc]
