"""`size: auto`, and no size at all: what is made of a picture has its aspect, at about the model's own pixels."""

from __future__ import annotations

import io
import math

import diffusers
import pytest
from PIL import Image

from safelight.backends.diffusers import describe, has_pipeline, pipeline_entry
from safelight.core.schema import ModelSchema
from safelight.errors import InvalidParameterError, ModelIndexError
from safelight.runtime.cost import request_cost
from safelight.serving.fields import Asked, resolve
from safelight.serving.http_args import HTTPArgs
from safelight.serving.limits import Limits
from tests.serving.stub_engine import IMAGE_TO_VIDEO_SCHEMA, VIDEO_SCHEMA

WAN_480P = {**IMAGE_TO_VIDEO_SCHEMA.defaults, "height": 480, "width": 832}
ASPECTS = [(832, 480), (480, 832), (500, 500), (1000, 300), (300, 1000), (1, 1), (1920, 1080), (333, 777)]


def schema_with(schema: ModelSchema, **changes) -> ModelSchema:
    return ModelSchema(**{**vars(schema), **changes})


def png(size, turn=None):
    file, exif = io.BytesIO(), Image.Exif()
    if turn is not None:
        exif[0x0112] = turn
    Image.new("RGB", size, "red").save(file, "PNG", exif=exif)
    return file.getvalue()


def sides(schema, pictures, **own):
    prompt = {"prompt": "x"} if "prompt" in schema.params_cls.options() else {}
    places: dict[str, list[tuple[int, ...]]] = {name: [(0,)] if name == "image" else [()] for name in pictures}
    asked = Asked(schema, {**own}, prompt, pictures, places)
    params = resolve(asked, Limits(max_cost=math.inf)).params
    return params.width, params.height


def assert_fits(made, size, schema, step):
    width, height = made
    area = schema.defaults["width"] * schema.defaults["height"]
    scale = math.sqrt(area / (size[0] * size[1]))
    assert width % step == height % step == 0
    assert abs(width - size[0] * scale) <= step / 2 + 1e-6 and abs(height - size[1] * scale) <= step / 2 + 1e-6


@pytest.mark.parametrize("size", ASPECTS, ids=str)
@pytest.mark.parametrize("own", [{}, {"size": "auto"}], ids=["unset", "auto"])
@pytest.mark.parametrize("field", ["image", "input_reference"])
def test_a_video_has_the_aspect_of_its_first_picture(size, own, field):
    schema = schema_with(IMAGE_TO_VIDEO_SCHEMA, defaults=WAN_480P)
    assert_fits(sides(schema, {field: [png(size)]}, **own), size, schema, 16)


def test_a_picture_is_seen_as_it_is_turned():
    schema = schema_with(IMAGE_TO_VIDEO_SCHEMA, defaults=WAN_480P)
    assert sides(schema, {"image": [png((832, 480), turn=6)]}) == (480, 832)


def test_the_first_picture_counts_where_there_is_a_last_one_too():
    schema = schema_with(IMAGE_TO_VIDEO_SCHEMA, defaults=WAN_480P)
    assert sides(schema, {"image": [png((480, 832))], "last_image": [png((500, 500))]}) == (480, 832)


def test_what_is_asked_for_goes_before_it_and_text_alone_has_the_models_size():
    schema = schema_with(IMAGE_TO_VIDEO_SCHEMA, defaults=WAN_480P)
    assert sides(schema, {"image": [png((300, 300))]}, size="64x96") == (64, 96)
    assert sides(VIDEO_SCHEMA, {}, size="auto") == (48, 32)


def packages_pipelines():
    """Return the names of the package's pipelines that make videos of pictures, at a size of their own."""
    for name in dir(diffusers):
        if name.endswith("Pipeline") and has_pipeline(name):
            try:
                cls = pipeline_entry(name).sampling_param_cls()
            except ModelIndexError:
                continue  # its call needs what cannot be asked for
            known = [cls.defaults.get("height"), cls.defaults.get("width")]
            if "num_frames" in cls.options() and "image" in cls.options() and all(known):
                yield name


def test_a_pipeline_of_the_package_is_given_sides_like_its_own():
    """Its rule is not known; its own sides obey it, and so do multiples of what divides both."""
    names = list(packages_pipelines())
    assert len(names) >= 5
    for name in names:
        schema = describe(name, name, pipeline_entry(name).sampling_param_cls(), ())
        step = math.gcd(schema.defaults["height"], schema.defaults["width"], 64)
        assert step >= 8, name
        for size in ASPECTS:
            assert_fits(sides(schema, {"image": [png(size)]}), size, schema, step)


BASES = {
    "http://localhost:8000": True,
    "https://pictures.example.org": True,
    "https://pictures.example.org/": True,
    "https://example.org/pictures": True,
    "http://[::1]:8000": True,
    "localhost:8000": False,
    "pictures.example.org": False,
    "//pictures.example.org": False,
    "/pictures": False,
    "": False,
    "ftp://example.org": False,
    "https://": False,
    "https:///path": False,
    "https://example.org:port": False,
    "https://example.org:99999": False,
    "https://[::1": False,
    "https://example.org/?a=1": False,
    "https://example.org/#a": False,
    "https://user:secret@example.org": False,
    "https://exa mple.org": False,
    "https://example.org\n": False,
    "javascript:alert(1)": False,
}


@pytest.mark.parametrize(("url", "taken"), BASES.items())
def test_the_address_that_clients_are_given_has_a_scheme_and_a_host(url, taken):
    if taken:
        assert HTTPArgs(public_url=url).public_url == url
        return
    with pytest.raises(InvalidParameterError, match=r"public_url: .*https://") as caught:
        HTTPArgs(public_url=url)
    assert caught.value.param == "public_url"


SOLVERS = {"heun": (), "unipc": ("sigmas",)}


def test_a_solver_is_asked_for_by_name():
    """The schema says which there are; steps of two calls cost two, and are no other quality."""
    schema = schema_with(VIDEO_SCHEMA, solvers=SOLVERS)
    assert schema.json_schema()["properties"]["scheduler"]["enum"] == ["heun", "unipc"]
    given = {"prompt": "x", "num_inference_steps": 20}
    limits = Limits(max_cost=math.inf)
    plain, heun = (resolve(Asked(schema, {}, {**given, **more}, {}), limits) for more in ({}, {"scheduler": "heun"}))
    assert heun.params.described()["scheduler"] == "heun" and "scheduler" not in plain.params.described()
    assert heun.params.num_steps() == 39 and heun.quality == plain.quality
    assert request_cost(heun.params, schema) * 20 == request_cost(plain.params, schema) * 39
    for asked in ("euler", "Heun", "heun_karras", ""):
        with pytest.raises(InvalidParameterError, match=r"scheduler: got .*; it takes one of heun, unipc"):
            resolve(Asked(schema, {}, {**given, "scheduler": asked}, {}), limits)
    with pytest.raises(InvalidParameterError, match="scheduler: got 'heun'; it takes nothing: this model runs with"):
        resolve(Asked(VIDEO_SCHEMA, {}, {**given, "scheduler": "heun"}, {}), limits)
