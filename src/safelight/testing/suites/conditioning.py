"""Embeddings and image latents of earlier requests: found again for the same inputs alone, to the byte."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from PIL import Image
from torch import Tensor

from safelight.core.executor import Execution
from safelight.core.pipeline import ComposedPipeline
from safelight.core.stage import PipelineStage
from safelight.testing.models import TinyModels, load, requests, run_alone, same, single
from safelight.testing.recipes import Case, Recipe
from safelight.testing.suites.suite import Suite

Conditioning = tuple[list[Tensor], list[str]]
NOT_FOUND = (
    "made again: a stage that encodes asks `self.cache`, and one that is made of such stages names them in `parts`"
)


class ConditioningSuite(Suite):
    """The conditioning cache, which lies under every stage that encodes."""

    def test_stages_name_their_parts(self, recipe: Recipe, tiny_models: TinyModels) -> None:
        """The cache, and whatever else is given to stages, reaches those inside others through `parts` alone."""
        for name, stage in tiny_models.ours(recipe).stages.items():
            inner = {attribute: part for attribute, part in vars(stage).items() if isinstance(part, PipelineStage)}
            left_out = [attribute for attribute, part in inner.items() if part not in stage.parts()]
            assert left_out == [], f"{name}: {type(stage).__name__}.parts() leaves them out: return them there"

    def test_what_was_made_before_is_found_and_nothing_else(self, recipe: Recipe, tiny_models: TinyModels) -> None:
        """Each variant of a case is made once, then found."""
        case = next((case for case in recipe.cases if "image" in case.fields), recipe.cases[0])
        plain = tiny_models.ours(recipe, case.variant)
        caching = load(tiny_models.folder(recipe, case.variant))
        cache = caching.conditioning_cache
        for fields in variants(case):
            expected = conditioning(plain, fields)
            assert equal(conditioning(caching, fields), expected), "made for the first time"
            misses, hits = cache.num_misses, cache.num_hits
            assert equal(conditioning(caching, fields), expected), "found"
            found, encodings = cache.num_hits - hits, len(expected[0])
            assert found >= encodings, f"{encodings - found} of {encodings} encodings are {NOT_FOUND}"
            assert cache.num_misses == misses, f"{cache.num_misses - misses} encodings are {NOT_FOUND}"

    @pytest.mark.slow
    def test_outputs_of_one_request_share_the_work(self, recipe: Recipe, tiny_models: TinyModels) -> None:
        """The second output finds what the first one made."""
        case = recipe.cases[0]
        plain, caching = tiny_models.ours(recipe, case.variant), load(tiny_models.folder(recipe, case.variant))
        fields = {**single(case), "seed": 3, "n": 2}
        made, expected = ([run_alone(each, req) for req in requests(each, fields)] for each in (caching, plain))
        cache = caching.conditioning_cache
        assert cache.num_hits == cache.num_misses > 0, f"they are {NOT_FOUND}"
        assert same(made, expected)


def conditioning(pipeline: ComposedPipeline, fields: Mapping[str, Any]) -> Conditioning:
    """Return what the encoders made for a request: all of it, before the first step, and the warnings."""
    req = requests(pipeline, fields)[0]
    with Execution(pipeline, req) as execution:
        while not req.in_loop:
            execution.advance()
        embeds = [] if req.image_embeds is None else [req.image_embeds]
        made = [*req.prompt_embeds, *req.negative_prompt_embeds, *embeds, *req.image_latents]
        return [tensor.clone() for tensor in made], list(req.warnings)


def equal(made: Conditioning, expected: Conditioning) -> bool:
    """Say whether two requests were given the same bytes and warnings."""
    return made[1] == expected[1] and same(made[0], expected[0])


def variants(case: Case) -> Iterator[dict[str, Any]]:
    """Return a case's fields, and the same with one of them changed."""
    fields = {name: value for name, value in case.fields.items() if name != "num_inference_steps"}
    yield fields
    yield {**fields, "prompt": "an owl " * 200}
    if "negative_prompt" in fields:
        yield {**fields, "negative_prompt": "a moon"}
    if "image" in fields:
        images = fields["image"] if isinstance(fields["image"], list) else [fields["image"]]
        yield {**fields, "image": [image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for image in images]}
        yield {**fields, "image": [image.resize((image.width, image.height // 2)) for image in images]}
    if "width" in fields and "height" in fields:
        yield {**fields, "width": 2 * fields["width"]}
