"""A request's bytes do not depend on what else runs, on being closed, or on being moved."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from safelight.core.executor import Execution
from safelight.core.pipeline import ComposedPipeline
from safelight.core.request import Req, map_tensors, move
from safelight.runtime.worker.engine import Engine
from safelight.runtime.worker.gpu_worker import warm_up
from safelight.testing.models import TinyModels, alone, cases_of, requests, same
from safelight.testing.recipes import Recipe
from safelight.testing.suites.suite import Suite

STATE = "something of a request is held outside it: by a module, a stage, the configuration, or a shared scheduler"
HELD = "a tensor was held across a yield, or is a view of another one"


KEPT = ("transformer", "vae", "scheduler")
"""Components whose attributes a request leaves as they were."""


class InterleavingSuite(Suite):
    """Several requests at once, closed ones and moved ones."""

    def test_the_first_small_request_is_one_that_the_model_takes(
        self, recipe: Recipe, tiny_models: TinyModels, caplog: pytest.LogCaptureFixture
    ) -> None:
        """It warms a server up, and is what is compiled for."""
        warm_up(Engine(tiny_models.ours(recipe)))
        assert caplog.text == ""

    def test_interleaved_requests_give_the_bytes_of_each_alone(self, recipe: Recipe, tiny_models: TinyModels) -> None:
        """A unit of each in turn."""
        pipeline = tiny_models.ours(recipe)
        asked = [*cases_of(recipe), {**cases_of(recipe)[0], "seed": 77}]
        expected = [alone(pipeline, fields) for fields in asked]
        executions = [Execution(pipeline, requests(pipeline, fields)[0]) for fields in asked]
        running = list(executions)
        while running:
            running = [execution for execution in running if execution.advance()]
        for execution, outputs in zip(executions, expected, strict=True):
            assert same(execution.req.outputs, outputs), STATE

    def test_closing_one_in_the_middle_leaves_the_others_alone(self, recipe: Recipe, tiny_models: TinyModels) -> None:
        """Wherever it is closed."""
        pipeline = tiny_models.ours(recipe)
        first, second = cases_of(recipe)[:2]
        expected = alone(pipeline, second)
        units = count_units(pipeline, first)
        for closed_at in range(0, units, 3):
            victim = Execution(pipeline, requests(pipeline, first)[0])
            other = Execution(pipeline, requests(pipeline, second)[0])
            for unit in range(units * 3):
                if unit < closed_at:
                    victim.advance()
                elif unit == closed_at:
                    victim.close()
                if not other.advance():
                    break
            assert same(other.req.outputs, expected), STATE
            assert not torch.is_inference_mode_enabled(), "a `with` block spans a yield"

    def test_moved_after_every_unit(self, recipe: Recipe, tiny_models: TinyModels) -> None:
        """Every tensor is replaced by a clone and its old storage filled with NaN: nothing may hold the old one."""
        pipeline = tiny_models.ours(recipe)
        for fields in cases_of(recipe):
            expected = alone(pipeline, fields)
            (req,) = requests(pipeline, fields)
            moved = 0
            weights = {
                tensor.untyped_storage().data_ptr()
                for module in pipeline.modules().values()
                for tensor in module.state_dict().values()
            }

            def poisoned(tensor: Tensor, weights: set[int] = weights) -> Tensor:
                nonlocal moved
                moved += 1
                clone = tensor.clone()
                assert tensor.untyped_storage().data_ptr() not in weights, "a request holds a weight"
                if tensor.is_floating_point() or tensor.is_complex():
                    tensor.fill_(float("nan"))
                return clone

            with Execution(pipeline, req) as execution:
                while execution.advance():
                    with torch.inference_mode():
                        map_tensors(req, poisoned)
            assert moved > 20
            assert same(req.outputs, expected), HELD

    def test_a_moved_request_keeps_its_aliases(self, recipe: Recipe, tiny_models: TinyModels) -> None:
        """What is one tensor twice is moved once."""
        pipeline = tiny_models.ours(recipe)
        (req,) = requests(pipeline, cases_of(recipe)[0])
        with Execution(pipeline, req) as execution:
            while not req.in_loop:
                execution.advance()
            before, embeds = aliases(req), req.prompt_embeds[-1]
            with torch.inference_mode():
                map_tensors(req, torch.clone)
            assert aliases(req) == before
            assert req.prompt_embeds[-1] is not embeds
            move(req, "cpu")
            assert aliases(req) == before

    def test_a_closed_request_holds_nothing(self, recipe: Recipe, tiny_models: TinyModels) -> None:
        """Its tensors go with it."""
        pipeline = tiny_models.ours(recipe)
        (req,) = requests(pipeline, cases_of(recipe)[0])
        execution = Execution(pipeline, req)
        while req.step_index < 1:
            execution.advance()
        execution.close()
        assert isinstance(req.latents, Tensor) and req.timesteps is not None
        held = [weakref.ref(tensor) for tensor in (req.latents, req.prompt_embeds[-1], req.timesteps)]
        del execution, req
        gc.collect()
        assert [reference() for reference in held] == [None] * len(held), STATE

    def test_modules_and_stages_hold_no_request_state(self, recipe: Recipe, tiny_models: TinyModels) -> None:
        """No attribute of stages, configuration or modules is another after a request; a VAE's cache is empty."""
        pipeline = tiny_models.ours(recipe)
        alone(pipeline, cases_of(recipe)[0])
        before = attributes(pipeline)
        alone(pipeline, cases_of(recipe)[1])
        assert attributes(pipeline) == before, STATE


def count_units(pipeline: ComposedPipeline, fields: Mapping[str, Any]) -> int:
    """Return how many units a request has."""
    units = 0
    with Execution(pipeline, requests(pipeline, fields)[0]) as execution:
        while execution.advance():
            units += 1
    return units


def aliases(req: Req) -> list[tuple[str, int]]:
    """Return which arguments of the pending calls are the request's own embeddings, and whether the schedule is the
    solver's.
    """
    found = [
        (name, index)
        for name, value in req.pending[0].kwargs.items()
        for index, embeds in enumerate(req.prompt_embeds)
        if value is embeds
    ]
    return [*found, ("schedule", int(req.timesteps is req.scheduler.timesteps))]


def attributes(pipeline: ComposedPipeline) -> dict[str, object]:
    """Return every attribute of the stages, the configuration and the components: numbers by value, others by id."""

    def held(value: Any) -> object:
        values = value if isinstance(value, list) else [value]
        return tuple(values) if all(entry is None or isinstance(entry, int) for entry in values) else id(value)

    components = {name: pipeline.get_module(name) for name in KEPT if name in pipeline.components.modules}
    holders = {**pipeline.stages, "config": pipeline.config, "pipeline": pipeline, **components}
    return {f"{holder}.{name}": held(value) for holder, owner in holders.items() for name, value in vars(owner).items()}
