"""Pipelines of the package: what they need, counted without weights, against what is alive as they run; and offload."""

from __future__ import annotations

import functools

import pytest
import torch

from safelight import ServerArgs
from safelight.acceleration.activations import LiveStorages
from safelight.acceleration.plan import WORKSPACE, plan_mode
from safelight.backends.diffusers import stage_of
from safelight.core.executor import Execution
from safelight.errors import InvalidParameterError
from safelight.loading.footprint import Peaks, empty_pipeline, measure
from safelight.loading.loader import load_pipeline
from safelight.loading.repository import open_repository
from safelight.testing.models import requests
from tests.acceleration import packages
from tests.acceleration.memories import LateMemory

NAMES = list(packages.BUILDERS)
QUICK = ("StableDiffusionXLPipeline",)
CASES = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in NAMES]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return functools.cache(lambda name: packages.build(name, tmp_path_factory.mktemp(name)))


def settings(path, **others):
    return ServerArgs(str(path), device="cpu", dtype="float32", backend="diffusers", **others)


def fields(name):
    return {**packages.FIELDS[name], **packages.COMMON}


@functools.cache
def footprint(path, name):
    return measure(open_repository(path, backend="diffusers"), settings(path), fields(name))


def pixels(pipeline, name, seed=1):
    (req,) = requests(pipeline, {**fields(name), "seed": seed})
    with Execution(pipeline, req) as execution:
        while execution.advance():
            pass
    return req.outputs[0]


def counted(pipeline, name):
    """Return the most bytes that were alive in each stage of a request that is really run, beside weights."""
    (req,) = requests(pipeline, {**fields(name), "seed": 1})
    with LiveStorages() as live, torch.inference_mode():
        peaks = Peaks(live)
        done: list[tuple[str, str]] = []

        def ask(call):
            if done:
                peaks.record(req, *done[-1])
            done.append((stage_of(call.component, call.method), call.component))
            return pipeline.forward(call)

        pipeline.call_stage.call(req, ask)
        peaks.record(req, *done[-1])
    return peaks.most


@pytest.mark.parametrize("name", CASES)
def test_what_is_planned_is_what_is_counted(folder, name):
    path = folder(name)
    pipeline = load_pipeline(settings(path))
    planned = {(stage.stage, stage.component): stage.activations for stage in footprint(path, name).stages}
    seen = counted(pipeline, name)
    assert planned.keys() == seen.keys()
    for unit, most in seen.items():
        # An encoder is given a mask without weights, which it can leave out where it sees that all of it is text.
        assert 0.9 * most <= planned[unit] <= (1.1 if unit[0] != "text_encoding" else 1.25) * most, unit
    assert 0.95 * max(seen.values()) <= max(planned.values()) <= 1.05 * max(seen.values())
    for component, module in pipeline.modules().items():
        weights = sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))
        taken = footprint(path, name).components[component].num_bytes
        assert weights <= taken <= weights + 512 * len([*module.parameters(), *module.buffers()])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", CASES)
def test_planned_components_have_the_tensors_that_are_loaded(folder, name, dtype):
    """Names, shapes and dtypes, a component's own among them."""
    args = ServerArgs(
        str(folder(name)), device="cpu", dtype=dtype, backend="diffusers", component_dtypes={"vae": "float32"}
    )
    planned = empty_pipeline(open_repository(args.model, backend="diffusers"), args).modules()
    loaded = load_pipeline(args).modules()
    assert planned.keys() == loaded.keys()
    for component, module in loaded.items():
        expected = {key: (tensor.shape, tensor.dtype) for key, tensor in module.named_parameters()}
        assert {key: (tensor.shape, tensor.dtype) for key, tensor in planned[component].named_parameters()} == expected
    assert {tensor.dtype for tensor in loaded["vae"].parameters()} == {torch.float32}


@pytest.mark.parametrize("mode", ["components", "blocks", "alternates"])
@pytest.mark.parametrize("name", CASES)
def test_weights_that_come_when_they_are_used_give_the_same_bytes(folder, name, mode):
    path = folder(name)
    if mode == "alternates" and name != "WanPipeline":
        with pytest.raises(InvalidParameterError, match="offload: got 'alternates'; it takes none for this model"):
            load_pipeline(settings(path, offload=mode, memory_limit="8GiB"), LateMemory())
        return
    usual = measure(open_repository(path, backend="diffusers"), settings(path), {})
    memory = LateMemory()
    args = settings(path, offload=mode, memory_limit=plan_mode(usual, 0, mode, False).peak + WORKSPACE)
    pipeline = load_pipeline(args, memory)
    reference = load_pipeline(settings(path))
    for seed in (1, 2):
        assert torch.equal(pixels(pipeline, name, seed), pixels(reference, name, seed))
    assert not torch.equal(pixels(reference, name, 1), pixels(reference, name, 2))
    assert pipeline.residency.num_swaps > 2
    assert memory.num_copies > pipeline.residency.num_swaps


def test_a_component_that_there_is_not_has_no_dtype(folder):
    args = settings(folder("StableDiffusionXLPipeline"), component_dtypes={"transformer": "float32"})
    with pytest.raises(
        InvalidParameterError, match=r"component_dtypes: got 'transformer'; it takes components of this"
    ):
        load_pipeline(args)
