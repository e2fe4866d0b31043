"""The suites see what they promise to see, say what to do, and leave a reference's warnings to it."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest

from safelight.stages.conditioning import ConditioningStage
from safelight.stages.text_encoding import TextEncodingStage
from safelight.testing.suites import ConditioningSuite, FamilySuite, InterleavingSuite, StackingSuite
from tests.recipes.flux import FLUX

LONE = replace(FLUX, cases=(FLUX.cases[0],))


class Combined(ConditioningStage):
    """A stage that has another one inside, and does not say so."""

    def __init__(self, config, inner):
        super().__init__(config)
        self.inner = inner


def test_a_stage_that_hides_another_is_told_what_to_do(tiny_models, monkeypatch):
    pipeline = tiny_models.ours(FLUX)
    inner = TextEncodingStage([], None, pipeline.config)
    monkeypatch.setitem(pipeline.stages, "combined", Combined(pipeline.config, inner))
    with pytest.raises(AssertionError, match=r"combined: Combined.parts\(\) leaves them out: return them there"):
        ConditioningSuite().test_stages_name_their_parts(FLUX, tiny_models)


def test_a_cache_that_is_never_asked_is_told_what_to_do(tiny_models, monkeypatch):
    call = TextEncodingStage._call

    def uncached(self, *args):
        self.cache.clear()
        return call(self, *args)

    monkeypatch.setattr(TextEncodingStage, "_call", uncached)
    with pytest.raises(AssertionError, match="2 of 2 encodings are made again: a stage that encodes asks"):
        ConditioningSuite().test_what_was_made_before_is_found_and_nothing_else(LONE, tiny_models)


def test_a_name_forgotten_in_shared_kwargs_fails(tiny_models, monkeypatch):
    monkeypatch.setattr(type(tiny_models.ours(FLUX).config), "shared_kwargs", frozenset())
    with pytest.raises(AssertionError, match="has no batch dimension"):
        StackingSuite().test_a_call_stacked_with_another_requests_is_itself(LONE, tiny_models)


def test_state_in_a_module_is_told_what_it_is(tiny_models, monkeypatch):
    transformer = tiny_models.ours(FLUX).get_module("transformer")
    monkeypatch.setattr(transformer, "_calls", 0, raising=False)

    def counting(module, _args):
        module._calls += 1

    with transformer.register_forward_pre_hook(counting), pytest.raises(AssertionError, match="held outside it"):
        InterleavingSuite().test_modules_and_stages_hold_no_request_state(FLUX, tiny_models)


def test_a_warning_of_a_reference_is_its_own(tmp_path):
    """Where its code runs, whatever it is; and in modules of the libraries, whoever calls them."""

    def build(folder, variant):
        warnings.warn("an old name", FutureWarning, stacklevel=1)
        folder.joinpath(variant).touch()

    replace(FLUX, build=build).write(tmp_path)
    assert (tmp_path / "default").exists()
    mark = FamilySuite.pytestmark
    assert mark.name == "filterwarnings" and mark.args == (
        r"ignore:::(accelerate|diffusers|huggingface_hub|tokenizers|transformers)(\.|$)",
    )
