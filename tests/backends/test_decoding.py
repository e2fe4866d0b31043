"""Decoding in bands within a pipeline's call: near the package's own pixels, in several units, in less memory."""

from __future__ import annotations

import dataclasses
import functools

import pytest

from safelight import ServerArgs
from safelight.backends.diffusers import DiffusersPipeline
from safelight.core.executor import Execution
from safelight.errors import InvalidParameterError
from safelight.loading.footprint import measure
from safelight.loading.loader import load_pipeline
from safelight.loading.repository import open_repository
from safelight.testing.models import requests
from tests.acceleration import packages

NEAR = 1e-5
"""Of pixels in [0, 1], as for the families."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return functools.cache(lambda name: packages.build(name, tmp_path_factory.mktemp(name)))


def settings(path, **others):
    return ServerArgs(str(path), device="cpu", backend="diffusers", **others)


def made(pipeline, fields):
    """Return the pixels, and how many units the decoding had."""
    (req,) = requests(pipeline, fields)
    num_units = 0
    with Execution(pipeline, req) as execution:
        while execution.advance():
            num_units += any(call.component == "vae" and call.method == "decode" for call in req.pending)
    return req.outputs[0], num_units


@pytest.mark.parametrize("name", ["StableDiffusion3Pipeline", pytest.param("WanPipeline", marks=pytest.mark.slow)])
def test_bands_are_units_and_near_the_packages_own(folder, name):
    path = folder(name)
    banded, plain = load_pipeline(settings(path, vae_tiling="exact")), load_pipeline(settings(path))
    assert isinstance(banded, DiffusersPipeline) and banded.vae is not None
    banded.call_stage.vae = dataclasses.replace(banded.vae, unit_cost=1)
    pictures = []
    for seed in (1, 2):
        fields = {**packages.FIELDS[name], **packages.COMMON, "seed": seed, "height": 128, "num_inference_steps": 2}
        (ours, num_units), (theirs, one) = made(banded, fields), made(plain, fields)
        assert (ours - theirs).abs().max() <= NEAR
        assert one == 1 < 4 < num_units
        pictures.append(ours)
    assert (pictures[0] - pictures[1]).abs().max() > 100 * NEAR


@pytest.mark.slow
def test_bands_take_less_memory_in_the_plan(folder):
    path = folder("StableDiffusion3Pipeline")
    footprint = measure(
        open_repository(path, backend="diffusers"),
        settings(path, dtype="float32"),
        {"height": 384, "width": 384},
        with_tiles=True,
    )
    taken = [
        next(each.activations for each in stages if each.stage == "decoding")
        for stages in (footprint.stages, footprint.tiled or ())
    ]
    assert taken[1] < 0.8 * taken[0], "of so few channels the pixels themselves are most"


@pytest.mark.parametrize(("name", "reason"), [("LTXPipeline", "AutoencoderKLLTXVideo: ")])
def test_a_vae_that_cannot_be_decoded_so_is_refused_at_start(folder, name, reason):
    with pytest.raises(InvalidParameterError, match=f"vae_tiling: got 'exact'; it takes none with {reason}"):
        load_pipeline(settings(folder(name), vae_tiling="exact"))
