"""Every pipeline on the device: held to Diffusers there, and to itself alone, whatever else runs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from safelight import ServerArgs
from safelight.core.executor import Execution
from safelight.core.request import move
from safelight.loading.loader import load_pipeline
from safelight.runtime.worker.engine import Engine
from safelight.testing.models import alone, cases_of, requests, same
from safelight.testing.reference import call_reference, run_ours
from safelight.testing.suites import Suite
from tests.recipes import all_recipes

pytestmark = pytest.mark.cuda

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BOUNDS = {"float32": 1e-4, "bfloat16": 0.03}
"""Of the largest latent: how far a step may be from Diffusers', whose attention may be another kernel."""


class TestOnDevice(Suite):
    recipes = tuple(all_recipes().values())

    @pytest.fixture
    def on_device(self, recipe, tiny_models, device):
        """Return a function that loads the recipe's model on the device."""

        def load(dtype="float32", **settings):
            settings = {"conditioning_cache": "0", **settings}
            return load_pipeline(
                ServerArgs(str(tiny_models.folder(recipe)), device=str(device), dtype=dtype, **settings)
            )

        return load

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_steps_and_pixels_are_the_references(self, recipe, tiny_models, on_device, device, dtype):
        case = next(each for each in recipe.cases if each.variant == "default" and not each.slow)
        ours = on_device(dtype)
        reference = recipe.reference(tiny_models.folder(recipe), dtype=DTYPES[dtype]).to(device)
        (req, *_) = requests(ours, {**case.fields, "n": 1})
        expected = call_reference(reference, recipe, [req])
        noise, steps = run_ours(ours, req)
        assert torch.equal(noise.cpu(), expected.noise[:1].cpu())
        assert len(steps) == len(expected.steps) == req.num_inference_steps
        scale = max(1.0, float(expected.steps[-1].float().abs().max()))
        for step, wanted in zip(steps, expected.steps, strict=True):
            assert float((step[0].float() - wanted[0].float()).abs().max()) <= BOUNDS[dtype] * scale
        pixels = np.asarray(expected.pixels[0])
        pictures = np.stack([picture.numpy() for picture in req.outputs]).reshape(pixels.shape)
        assert np.abs(pictures - pixels).mean() <= BOUNDS[dtype]

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_three_requests_at_once_give_the_bytes_of_each_alone(self, recipe, on_device, dtype):
        pipeline = on_device(dtype)
        asked = [*cases_of(recipe), {**cases_of(recipe)[0], "seed": 77}]
        expected = [alone(pipeline, fields) for fields in asked]
        times = iter(range(10**9))
        engine = Engine(pipeline, clock=lambda: float(next(times)))
        tasks = []
        for index, fields in enumerate(asked):
            (req,) = requests(pipeline, fields)
            req.request_id = f"r{index}"
            tasks.append(engine.add(req))
        while engine.tasks:
            engine.tick()
        for task, outputs in zip(tasks, expected, strict=True):
            assert task.error is None
            assert same(task.execution.req.outputs, outputs)

    def test_moved_to_the_host_and_back_after_every_unit(self, recipe, on_device):
        pipeline = on_device("bfloat16")
        fields = cases_of(recipe)[0]
        expected = alone(pipeline, fields)
        (req,) = requests(pipeline, fields)
        with Execution(pipeline, req) as execution:
            while execution.advance():
                with torch.inference_mode():
                    move(req, torch.device("cpu"))
                    move(req, pipeline.device)
        assert same(req.outputs, expected)
