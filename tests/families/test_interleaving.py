"""A request's bytes do not depend on what else runs, on being closed, or on being moved."""

from __future__ import annotations

import gc
import weakref

import torch

from safelight.core.executor import Execution
from safelight.core.request import map_tensors, move
from safelight.runtime.engine import Engine
from safelight.runtime.worker import warm_up
from tests.families.conftest import requests


def alone(pipeline, fields):
    (req,) = requests(pipeline, fields)
    with Execution(pipeline, req) as execution:
        while execution.advance():
            pass
    return req.outputs


def same(left, right):
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def cases_of(recipe):
    """Return the first cases of one output on the default checkpoint; they differ in size, text and branches."""
    fit = [case for case in recipe.cases if case.variant == "default" and not case.slow]
    return [{**case.fields, "n": 1} for case in fit if isinstance(case.fields["prompt"], str)][:3]


def test_the_first_small_request_is_one_that_the_model_takes(recipe, models, caplog):
    """It warms a server up, and is what is compiled for."""
    warm_up(Engine(models.ours(recipe)))
    assert caplog.text == ""


def test_interleaved_requests_give_the_bytes_of_each_alone(recipe, models):
    pipeline = models.ours(recipe)
    asked = [*cases_of(recipe), {**cases_of(recipe)[0], "seed": 77}]
    expected = [alone(pipeline, fields) for fields in asked]
    executions = [Execution(pipeline, requests(pipeline, fields)[0]) for fields in asked]
    running = list(executions)
    while running:
        running = [execution for execution in running if execution.advance()]
    for execution, outputs in zip(executions, expected, strict=True):
        assert same(execution.req.outputs, outputs)


def test_closing_one_in_the_middle_leaves_the_others_alone(recipe, models):
    pipeline = models.ours(recipe)
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
        assert same(other.req.outputs, expected)
        assert not torch.is_inference_mode_enabled()


def count_units(pipeline, fields):
    units = 0
    with Execution(pipeline, requests(pipeline, fields)[0]) as execution:
        while execution.advance():
            units += 1
    return units


def test_moved_after_every_unit(recipe, models):
    """Every tensor is replaced by a clone and its old storage filled with NaN: nothing may hold the old one."""
    pipeline = models.ours(recipe)
    for fields in cases_of(recipe):
        expected = alone(pipeline, fields)
        (req,) = requests(pipeline, fields)
        moved = 0
        weights = {
            tensor.untyped_storage().data_ptr()
            for module in pipeline.modules().values()
            for tensor in module.state_dict().values()
        }

        def poisoned(tensor, weights=weights):
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
        assert same(req.outputs, expected)


def test_a_moved_request_keeps_its_aliases(recipe, models):
    pipeline = models.ours(recipe)
    (req,) = requests(pipeline, cases_of(recipe)[0])
    with Execution(pipeline, req) as execution:
        while not req.in_loop:
            execution.advance()
        embeds = req.pending[0].kwargs["encoder_hidden_states"]
        assert embeds is req.prompt_embeds[-1]
        with torch.inference_mode():
            map_tensors(req, torch.clone)
        assert req.pending[0].kwargs["encoder_hidden_states"] is req.prompt_embeds[-1]
        assert req.prompt_embeds[-1] is not embeds
        assert req.timesteps is req.scheduler.timesteps
        move(req, "cpu")
        assert req.timesteps is req.scheduler.timesteps


def test_a_closed_request_holds_nothing(recipe, models):
    pipeline = models.ours(recipe)
    (req,) = requests(pipeline, cases_of(recipe)[0])
    execution = Execution(pipeline, req)
    while req.step_index < 1:
        execution.advance()
    execution.close()
    held = [weakref.ref(tensor) for tensor in (req.latents, req.prompt_embeds[-1], req.timesteps)]
    del execution, req
    gc.collect()
    assert [reference() for reference in held] == [None] * len(held)


def test_modules_and_stages_hold_no_request_state(recipe, models):
    """No attribute of stages, configuration or modules is another after a request; a VAE's cache is empty again."""
    pipeline = models.ours(recipe)
    alone(pipeline, cases_of(recipe)[0])

    def held(value):
        values = value if isinstance(value, list) else [value]
        return tuple(values) if all(entry is None or isinstance(entry, int) for entry in values) else id(value)

    def snapshot():
        holders = [*pipeline.stages.values(), pipeline.config, pipeline]
        holders += [
            pipeline.get_module(name)
            for name in ("transformer", "vae", "scheduler")
            if name in pipeline.components.modules
        ]
        return [{name: held(value) for name, value in vars(holder).items()} for holder in holders]

    before = snapshot()
    alone(pipeline, cases_of(recipe)[1])
    assert snapshot() == before
