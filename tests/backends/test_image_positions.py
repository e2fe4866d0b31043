"""Pipelines of the package that take images see them where the models' authors do."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from safelight import ServerArgs
from safelight.backends.image_positions import tell_where_images_are
from safelight.loading.loader import load_pipeline
from safelight.testing.models import requests, run_alone
from tests.recipes.qwen_image import EDIT, EDIT_PLUS, QWEN_IMAGE, image_positions


@pytest.mark.parametrize("recipe", [EDIT, EDIT_PLUS], ids=lambda recipe: recipe.pipeline_name)
def test_the_pictures_are_those_of_the_family(recipe, tmp_path, monkeypatch):
    recipe.patch(monkeypatch)
    recipe.build(tmp_path, "default")
    fields = {**recipe.cases[0].fields, "seed": 3, "output_type": "np"}
    ours = load_pipeline(ServerArgs(str(tmp_path), device="cpu"))
    expected = run_alone(ours, requests(ours, fields)[0]).numpy()
    pictures = {}
    for told in (True, False):
        pipe = recipe.reference(tmp_path, as_installed=True)
        if told:
            tell_where_images_are(pipe)
        given = {name: value for name, value in fields.items() if name != "seed"}
        pictures[told] = pipe(**given, generator=torch.Generator().manual_seed(3), return_dict=False)[0][0]
    assert np.abs(pictures[True] - expected).max() <= 1e-4
    assert np.abs(pictures[False] - expected).max() > 1e-2


def test_a_loaded_pipeline_is_told(tmp_path):
    QWEN_IMAGE.build(tmp_path, "default")
    pipeline = load_pipeline(ServerArgs(str(tmp_path), device="cpu", backend="diffusers"))
    encoder = pipeline.get_module("pipeline").text_encoder
    image = encoder.config.image_token_id
    ids, grid = torch.tensor([[5, *[image] * 6, 7, 8]]), torch.tensor([[1, 4, 6]])
    pixels = torch.randn(24, 3 * 2 * 14 * 14, generator=torch.Generator().manual_seed(0))
    images = {"pixel_values": pixels, "image_grid_thw": grid}
    with torch.no_grad():
        told, placed, words = (
            encoder(input_ids=ids, **images, **more, output_hidden_states=True).hidden_states[-1]
            for more in ({}, {"position_ids": image_positions(ids[0], grid, image, 2)}, {"position_ids": numbers(9)})
        )
    assert torch.equal(told, placed)
    assert float((told - words).abs().max()) > 1e-2
    with torch.no_grad():
        assert encoder(input_ids=ids[:, -2:]).logits.shape[1] == 2, "text alone needs no images"


def numbers(count):
    """Return positions of words."""
    return torch.arange(count).expand(4, 1, -1)
