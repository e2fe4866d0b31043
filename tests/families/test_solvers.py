"""Solvers by name: each that a family's model takes is held to Diffusers with the solver of its documented recipe."""

from __future__ import annotations

import warnings

import pytest
import torch

from safelight.core.executor import Execution
from safelight.core.request import map_tensors
from safelight.core.solver_names import all_names
from safelight.errors import InvalidParameterError
from safelight.preparation import prepare
from safelight.runtime.worker.engine import Engine
from safelight.testing.models import alone, requests
from safelight.testing.reference import distance, reference_arguments, run_ours
from tests.recipes import all_recipes
from tests.solver_recipes import from_recipe, seeded

NAMES = ("FluxPipeline", "QwenImagePipeline", "WanPipeline")
QUICK = {("FluxPipeline", "unipc"), ("QwenImagePipeline", "lcm_karras"), ("WanPipeline", "dpmpp_2m_sde")}
FEWEST = {"FluxPipeline": 8, "QwenImagePipeline": 6, "WanPipeline": 12}
TOLERANCE = 1e-4


def fields_of(name, **fields):
    given = {key: value for key, value in all_recipes()[name].cases[0].fields.items() if key != "sigmas"}
    return {**given, "n": 1, **fields}


def reference(pipe, recipe, req, solver):
    """Return Diffusers' pixels, and its latents after each step."""
    generator, steps, own = torch.Generator().manual_seed(req.params.seed), [], pipe.scheduler

    def record(_pipe, _step, _t, tensors):
        steps.append(tensors["latents"].clone())
        return tensors

    pipe.scheduler = seeded(solver, generator)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            given = reference_arguments(recipe, [req])
            made = pipe(**given, generator=generator, callback_on_step_end=record, return_dict=False)[0]
    finally:
        pipe.scheduler = own
    return made[0], steps


@pytest.mark.parametrize(
    ("name", "solver"),
    [
        pytest.param(name, solver, marks=() if (name, solver) in QUICK else pytest.mark.slow)
        for name in NAMES
        for solver in all_names()
    ],
)
def test_every_solver_is_held_to_diffusers_or_refused(name, solver, tiny_models):
    recipe = all_recipes()[name]
    ours, theirs = tiny_models.ours(recipe), tiny_models.reference(recipe)
    assert len(ours.schema.solvers) >= FEWEST[name]
    if solver not in ours.schema.solvers:
        with pytest.raises(InvalidParameterError, match="scheduler: got") as refused:
            prepare(ours.schema, fields_of(name, scheduler=solver))
        assert all(known in str(refused.value) for known in ours.schema.solvers)
        return
    for seed, num_steps in ((3, 4), (8, 5)):
        (req,) = requests(ours, fields_of(name, scheduler=solver, seed=seed, num_inference_steps=num_steps))
        _, steps = run_ours(ours, req)
        expected, their_steps = reference(theirs, recipe, req, from_recipe(solver, theirs.scheduler, flow=True))
        assert len(steps) == len(their_steps) == req.num_inference_steps == req.params.num_steps()
        for step, their_step in zip(steps, their_steps, strict=True):
            assert torch.allclose(step, their_step, rtol=0, atol=TOLERANCE)
        assert distance(req, expected) <= TOLERANCE
    (plain,) = requests(ours, fields_of(name, seed=8, num_inference_steps=5))
    run_ours(ours, plain)
    if type(plain.scheduler) is not type(req.scheduler):
        assert distance(plain, expected) > TOLERANCE, "the solver matters"


def several(name):
    """Return what is asked of one model at a time: its own solver, one of two calls a step, one that draws noise."""
    names = {"FluxPipeline": ("lcm", "dpmpp_2m_sde", "unipc"), "WanPipeline": ("heun", "lcm", "sa_solver", "euler")}
    return [fields_of(name, seed=5), *(fields_of(name, seed=5, scheduler=solver) for solver in names[name])]


@pytest.mark.parametrize("name", ["FluxPipeline", "WanPipeline"])
def test_requests_of_different_solvers_share_a_model(name, tiny_models):
    """In turns and moved they have the bytes of each alone; in one forward they have what each makes alone."""
    ours = tiny_models.ours(all_recipes()[name])
    asked = several(name)
    expected = [alone(ours, fields)[0] for fields in asked]
    assert all(not torch.equal(expected[0], other) for other in expected[1:])
    executions = [Execution(ours, requests(ours, fields)[0]) for fields in asked]
    running = list(executions)
    while running:
        running = [execution for execution in running if execution.advance()]
        for execution in running:
            with torch.inference_mode():
                map_tensors(execution.req, torch.clone)
    for execution, wanted in zip(executions, expected, strict=True):
        assert torch.equal(execution.req.outputs[0], wanted)
    times = iter(range(10**9))
    engine, tasks = Engine(ours, clock=lambda: float(next(times)), batching="throughput"), []
    for index, fields in enumerate(asked):
        (req,) = requests(ours, fields)
        req.request_id = f"r{index}"
        tasks.append(engine.add(req))
    while engine.tasks:
        engine.tick()
    for task, wanted in zip(tasks, expected, strict=True):
        assert task.error is None, task.error
        assert torch.allclose(task.execution.req.outputs[0], wanted, rtol=0, atol=TOLERANCE)
        assert task.execution.req.step_index == task.execution.req.num_inference_steps


def test_noise_levels_go_to_solvers_that_take_them(tiny_models):
    """FLUX leaves them to a solver with flow sigmas, where Diffusers would leave them out without a word."""
    schema = tiny_models.ours(all_recipes()["FluxPipeline"]).schema
    fields = {**fields_of("FluxPipeline"), "num_inference_steps": None, "sigmas": [1.0, 0.6, 0.2]}
    fields = {key: value for key, value in fields.items() if value is not None}
    assert vars(prepare(schema, {**fields, "scheduler": "euler"})[0])["sigmas"] == (1.0, 0.6, 0.2)
    with pytest.raises(InvalidParameterError, match=r"sigmas: got .*nothing with scheduler=unipc"):
        prepare(schema, {**fields, "scheduler": "unipc"})


def test_a_model_without_a_solver_has_none_to_choose(tiny_models):
    schema = tiny_models.ours(all_recipes()["WanDMDPipeline"]).schema
    assert not schema.solvers and "scheduler" not in schema.json_schema()["properties"]
    fields = {**all_recipes()["WanDMDPipeline"].cases[0].fields, "scheduler": "euler"}
    with pytest.raises(Exception, match="no solver steps"):
        prepare(schema, fields)
