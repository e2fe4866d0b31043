"""What shared code asks of parameters instead of knowing a family's fields, and the pieces that families choose."""

from __future__ import annotations

import pytest
from PIL import Image

from safelight.core.conditioning_cache import ConditioningCache
from safelight.core.registry import pipelines

SCALES = {"guidance_scale": 4.0, "true_cfg_scale": 4.0, "prompt": "a", "negative_prompt": "b"}


@pytest.fixture(params=list(pipelines()))
def params_cls(request):
    return pipelines()[request.param].sampling_param_cls()


def made(params_cls, **fields):
    return params_cls(**{**params_cls.defaults, **{k: v for k, v in fields.items() if k in params_cls.options()}})


def test_no_more_branches_than_stated_and_as_many_when_all_is_asked_for(params_cls):
    asked = made(params_cls, **SCALES)
    assert asked.num_branches() == params_cls.max_branches
    assert (asked.cfg_scale() == 4.0) is (params_cls.max_branches == 2)
    unguided = made(params_cls, **{**SCALES, "guidance_scale": 1.0, "true_cfg_scale": 1.0})
    assert unguided.num_branches() == 1


def test_a_size_is_asked_for_in_the_fields_that_there_are(params_cls):
    fields = params_cls.size_fields(64, 96)
    assert fields.keys() <= params_cls.options().keys()
    known = {"height": 64, "width": 96, "max_area": 64 * 96}
    assert fields == {name: value for name, value in known.items() if name in params_cls.options()}


def test_images_are_found_again_unless_a_field_changes_that_they_are_prepared_by(params_cls):
    cache, image = ConditioningCache(1), (Image.new("RGB", (8, 8)),)
    plain = cache.images_of(made(params_cls, image=image))
    others = {**SCALES, "sigmas": (1.0, 0.5), "seed": 3, "num_inference_steps": 7, "n": 2}
    assert cache.images_of(made(params_cls, image=image, **others)) == plain
    changed = {
        "height": 8,
        "max_area": 9,
        "auto_resize": False,
        "resolution": 1024,
        "layers": 2,
        "max_sequence_length": 3,
    }
    for name in changed.keys() & params_cls.options().keys():
        assert cache.images_of(made(params_cls, image=image, **{name: changed[name]})) != plain, name
