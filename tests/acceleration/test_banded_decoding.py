"""The pipelines with decoding in bands: the pixels of the undivided stage, boundaries, and requests that are moved."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from safelight import ServerArgs
from safelight.core.executor import Execution
from safelight.core.request import map_tensors
from safelight.core.trees import leaves
from safelight.errors import InvalidParameterError, NonFiniteOutputError
from safelight.loading.loader import load_pipeline
from safelight.loading.vaes import decode_in_bands, run_vae
from safelight.stages.decoding import DecodingState
from safelight.testing.models import requests
from tests.calls import loaded_as
from tests.recipes import all_recipes

NAMES = ("FluxPipeline", "WanPipeline", "QwenImagePipeline")


class Banded:
    """A pipeline of a recipe twice: as it is, and with its decoding in bands, a boundary after each unit."""

    def __init__(self, name, folder):
        self.recipe = all_recipes()[name]
        self.recipe.build(folder, "default")
        self.whole = load_pipeline(ServerArgs(str(folder), device="cpu", conditioning_cache="0"))
        self.bands = load_pipeline(ServerArgs(str(folder), device="cpu", vae_tiling="exact", conditioning_cache="0"))
        assert self.bands.vae is not None and self.bands.vae.decoder is not None
        vae = self.bands.get_module("vae")
        fine = dataclasses.replace(run_vae(vae, in_bands=True), decoder=decode_in_bands(vae, rows=24), unit_cost=1)
        self.bands = loaded_as(self.bands, vae=fine)
        fit = [case for case in self.recipe.cases if case.variant == "default" and not case.slow]
        fields = [case.fields for case in fit if isinstance(case.fields["prompt"], str)]
        self.fields = [{**entry, "n": 1, "num_inference_steps": 2} for entry in fields][:2]


@pytest.fixture(scope="module", params=NAMES)
def banded(request, tmp_path_factory):
    torch.manual_seed(0)
    return Banded(request.param, tmp_path_factory.mktemp("checkpoint") / request.param)


def finished(pipeline, fields, between=lambda req: None):
    """Return a request after its last unit, and the units that its decoding took."""
    (req,) = requests(pipeline, fields)
    units = 0
    with Execution(pipeline, req) as execution:
        while execution.advance():
            units += req.stage == "decoding"
            between(req)
    return req, units


def test_pixels_are_those_of_the_undivided_stage(banded):
    for fields in banded.fields:
        (whole, few), (bands, many) = (finished(pipeline, fields) for pipeline in (banded.whole, banded.bands))
        assert many > few + 1
        assert len(bands.outputs) == len(whole.outputs)
        for ours, expected in zip(bands.outputs, whole.outputs, strict=True):
            assert ours.shape == expected.shape
            assert ours.dtype == expected.dtype
            assert float((ours - expected).abs().max()) < 1e-5
        assert bands.stage_state is None


def test_outputs_of_other_types(banded):
    fields = banded.fields[0]
    whole, bands = (
        finished(pipeline, {**fields, "output_type": "pil"})[0] for pipeline in (banded.whole, banded.bands)
    )
    assert bands.outputs[0].dtype == torch.uint8
    assert (bands.outputs[0].int() - whole.outputs[0].int()).abs().max() <= 1
    whole, bands = (
        finished(pipeline, {**fields, "output_type": "latent"})[0] for pipeline in (banded.whole, banded.bands)
    )
    assert torch.equal(bands.outputs[0], whole.outputs[0])


def test_interleaved_and_moved_requests_give_the_bytes_of_each_alone(banded):
    """Every tensor is replaced by a clone and its old storage filled with NaN, after every unit of each request."""
    expected = [finished(banded.bands, fields)[0].outputs for fields in banded.fields]

    def poisoned(tensor):
        clone = tensor.clone()
        if tensor.is_floating_point() or tensor.is_complex():
            tensor.fill_(float("nan"))
        return clone

    executions = [Execution(banded.bands, requests(banded.bands, fields)[0]) for fields in banded.fields]
    running = list(executions)
    while running:
        running = [execution for execution in running if execution.advance()]
        with torch.inference_mode():
            for execution in running:
                map_tensors(execution.req, poisoned)
    for execution, outputs in zip(executions, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(execution.req.outputs, outputs, strict=True))


def test_closed_in_the_middle_of_decoding(banded):
    first, second = banded.fields
    expected = finished(banded.bands, second)[0].outputs
    victim = Execution(banded.bands, requests(banded.bands, first)[0])
    while not isinstance(victim.req.stage_state, DecodingState):
        assert victim.advance()
    victim.close()
    assert torch.equal(finished(banded.bands, second)[0].outputs[0], expected[0])


def test_what_is_not_finite_becomes_no_picture(banded):
    def broken(req):
        if req.stage == "decoding" and len(req.pending) and req.pending[0].key.step:
            for tensor in leaves(dict(req.pending[0].kwargs)):
                tensor.fill_(float("nan"))

    with torch.inference_mode(), pytest.raises(NonFiniteOutputError):
        finished(banded.bands, banded.fields[0], broken)


def test_a_setting_of_another_value_is_refused():
    with pytest.raises(InvalidParameterError, match="vae_tiling"):
        ServerArgs("model", vae_tiling="blended")
