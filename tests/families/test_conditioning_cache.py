"""Embeddings and image latents of earlier requests: found again for the same inputs alone, to the byte."""

from __future__ import annotations

import os

import pytest
import torch
from PIL import Image

from safelight import ServerArgs
from safelight.core.conditioning_cache import ConditioningCache
from safelight.core.executor import Execution, SyncExecutor
from safelight.errors import InvalidParameterError
from safelight.loading.digest import weights_digest
from safelight.loading.loader import load_pipeline
from tests.families.conftest import requests


def conditioning(pipeline, fields):
    """Return what the encoders made for a request: all of it, before the first step, and the warnings."""
    req = requests(pipeline, fields)[0]
    with Execution(pipeline, req) as execution:
        while not req.in_loop:
            execution.advance()
        embeds = [] if req.image_embeds is None else [req.image_embeds]
        made = [*req.prompt_embeds, *req.negative_prompt_embeds, *embeds, *req.image_latents]
        return [tensor.clone() for tensor in made], list(req.warnings)


def equal(made, expected):
    return made[1] == expected[1] and all(map(torch.equal, made[0], expected[0])) and len(made[0]) == len(expected[0])


def variants(case):
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


def test_what_was_made_before_is_found_and_nothing_else(recipe, models):
    case = next((case for case in recipe.cases if "image" in case.fields), recipe.cases[0])
    plain = models.ours(recipe, case.variant)
    folder = models.folder(recipe, case.variant)
    caching = load_pipeline(ServerArgs(str(folder), device="cpu"))
    cache = caching.conditioning_cache
    for fields in variants(case):
        expected = conditioning(plain, fields)
        assert equal(conditioning(caching, fields), expected), "made for the first time"
        misses, hits = cache.num_misses, cache.num_hits
        assert equal(conditioning(caching, fields), expected), "found"
        assert cache.num_misses == misses and cache.num_hits >= hits + len(expected[0])


@pytest.mark.slow
def test_outputs_of_one_request_share_the_work(recipe, models):
    case = recipe.cases[0]
    caching = load_pipeline(ServerArgs(str(models.folder(recipe, case.variant)), device="cpu"))
    fields = {**case.fields, "seed": 3}
    plain = models.ours(recipe, case.variant)
    made = []
    for pipeline in (plain, caching):
        reqs = requests(pipeline, {**fields, "n": 2})
        for req in reqs:
            for _ in SyncExecutor(pipeline).execute(req):
                pass
        made.append([req.outputs for req in reqs])
    cache = caching.conditioning_cache
    assert cache.num_hits == cache.num_misses > 0
    for ours, expected in zip(*made, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(ours, expected, strict=True))


def test_the_oldest_go_first_and_the_bound_holds():
    cache = ConditioningCache(100)
    for number in range(5):
        _, note = cache.put(torch.full((10,), number, dtype=torch.int32), number, "text_encoder", number)
        assert note == number
        cache.get("text_encoder", 0)
    assert cache.num_bytes == 80
    kept = [number for number in range(5) if cache.get("text_encoder", number) is not None]
    assert kept == [0, 4]
    large = torch.zeros(26, dtype=torch.int32)
    assert cache.put(large, None, "text_encoder", "large")[0] is large and cache.get("text_encoder", "large") is None
    view = torch.zeros(1000, dtype=torch.int32)[5:10]
    kept_view, _ = cache.put(view, None, "text_encoder", "view")
    assert kept_view.untyped_storage().nbytes() == 20 and torch.equal(kept_view, view)
    cache.clear()
    assert cache.num_bytes == 0 and cache.get("text_encoder", 4) is None


def test_other_weights_are_another_key(tmp_path):
    weights: dict[str, str] = {}
    cache = ConditioningCache(1000, weights)
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "config.json").write_text("{}")
    first = weights_digest(tmp_path)
    weights["vae"] = first
    cache.put(torch.ones(3), None, "vae", "cat")
    assert cache.get("vae", "cat") is not None and cache.get("text_encoder", "cat") is None
    (tmp_path / "config.json").write_text('{"a": 1}')
    second = weights_digest(tmp_path)
    os.utime(tmp_path / "model.safetensors", (1, 1))
    assert len({first, second, weights_digest(tmp_path)}) == 3
    weights["vae"] = second
    assert cache.get("vae", "cat") is None


@pytest.mark.parametrize("size", ["-1", "0 GiB", "much", ""])
def test_a_size_that_is_none_is_refused(size):
    with pytest.raises(InvalidParameterError, match="conditioning_cache"):
        ServerArgs(conditioning_cache=size)
