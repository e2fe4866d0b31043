"""Every pipeline of ours is held to Diffusers: token ids, schedule, noise, every step, pixels, defaults."""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack
from inspect import signature

from safelight.testing.models import requests, run_alone
from safelight.testing.suites import OutputsSuite, ParitySuite
from tests.recipes import all_recipes, own_pipelines


class TestParity(ParitySuite):
    recipes = tuple(all_recipes().values())


class TestOutputs(OutputsSuite):
    recipes = tuple(all_recipes().values())


def test_every_pipeline_of_ours_has_a_recipe():
    assert own_pipelines().keys() == all_recipes().keys()


def test_encoders_that_take_images_are_told_where_they_are(tiny_models, monkeypatch):
    """Without it some would count the tokens of an image like words, and say nothing."""
    told: Counter[str] = Counter()

    def check(encoder, _args, kwargs):
        if kwargs.get("pixel_values") is not None:
            assert not {"mm_token_type_ids", "position_ids"}.isdisjoint(kwargs)
            told[type(encoder).__name__] += 1

    for recipe in all_recipes().values():
        case = next((case for case in recipe.cases if "image" in case.fields), None)
        if case is None:
            continue
        pipeline = tiny_models.ours(recipe, case.variant)
        taking = [m for m in pipeline.modules().values() if "mm_token_type_ids" in signature(m.forward).parameters]
        with monkeypatch.context() as patch, ExitStack() as hooks:
            if recipe.patch is not None:
                recipe.patch(patch)
            for module in taking:
                hooks.enter_context(module.register_forward_pre_hook(check, with_kwargs=True))
            run_alone(pipeline, requests(pipeline, {**case.fields, "n": 1})[0])
    assert told.total() >= 2
