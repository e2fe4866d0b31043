"""Through the diffusers package too a seed is a seed, with every solver that a pipeline runs with."""

from __future__ import annotations

import copy
import inspect
import warnings

import diffusers
import pytest
import torch

from safelight import ServerArgs
from safelight.backends.solvers import Steps, own_solver
from safelight.core.solver import takes_generator
from safelight.loading.loader import load_pipeline
from safelight.testing.suites.seeds import FLOW, configurations, run_disturbed
from tests.backends.conftest import FIELDS

SOLVERS = {
    name: solver
    for name in dir(diffusers)
    if name.endswith("Scheduler")
    and isinstance(solver := getattr(diffusers, name), type)
    and issubclass(solver, diffusers.SchedulerMixin)
    and hasattr(solver, "set_timesteps")
}
PIPELINES = {"StableDiffusionXLPipeline": {}, "StableDiffusion3Pipeline": FLOW}
"""Pipelines, and what makes a solver one of their models."""
FEWEST = {"StableDiffusionXLPipeline": 20, "StableDiffusion3Pipeline": 10}
"""Configurations that each runs with, at least."""
DRAWING = {
    "StableDiffusionXLPipeline": {
        "DDPMScheduler",
        "DPMSolverMultistepScheduler",
        "DPMSolverSinglestepScheduler",
        "EulerAncestralDiscreteScheduler",
        "LCMScheduler",
        "SASolverScheduler",
    },
    "StableDiffusion3Pipeline": {
        "DPMSolverMultistepScheduler",
        "FlowMatchEulerDiscreteScheduler",
        "FlowMatchLCMScheduler",
    },
}
"""Of them, solvers that draw noise as they step, at least."""


def accepted(pipe, solver, config, fields):
    """Say whether the package itself makes a solver of a configuration, and a pipeline a picture with it."""
    try:
        running = copy.copy(pipe)
        running.scheduler = solver(**config)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            source = torch.Generator().manual_seed(0)
            made = running(prompt="a cat", **fields, output_type="pt", generator=source, return_dict=False)[0]
    except Exception:  # whatever a solver of other models raises
        return False
    return bool(torch.isfinite(made).all())


@pytest.mark.parametrize("name", PIPELINES)
def test_a_seed_is_a_seed_with_every_solver(name, checkpoint, monkeypatch):
    pipeline = load_pipeline(ServerArgs(str(checkpoint(name)), device="cpu"))
    pipe, fields = pipeline.get_module("pipeline"), {**FIELDS[name], "num_inference_steps": 3}
    randn, drawn, ran, drawing = torch.randn, [], 0, set()

    def counted(*args, **given):
        drawn.append(1)
        return randn(*args, **given)

    monkeypatch.setattr(torch, "randn", counted)
    for solver_name, solver in SOLVERS.items():
        for config in configurations(solver, **PIPELINES[name]):
            if not accepted(pipe, solver, config, fields):
                continue
            pipe.scheduler = solver(**config)
            drawn.clear()
            first, second = (run_disturbed(pipeline, {"prompt": "a cat", "seed": 3, **fields}, d) for d in (1, 1000))
            if len(drawn) > 2:  # more than the initial noise of both
                drawing.add(solver_name)
            assert torch.equal(first, second), f"{solver_name} {config}"
            ran += 1
    assert ran >= FEWEST[name] and drawing >= DRAWING[name]


def test_all_solvers_of_a_pipeline_are_the_requests_own(checkpoint):
    """A copy of a solver, as some pipelines make for a second stream, steps itself and not the one that it is of."""
    cls = diffusers.StableDiffusion3Pipeline
    shared = cls.from_pretrained(checkpoint("StableDiffusion3Pipeline")).scheduler
    told = []
    steps = Steps(torch.Generator().manual_seed(0), lambda *done: told.append(done))
    solver = own_solver(shared, steps)
    assert solver is not shared and type(solver) is type(shared) and solver.config == shared.config
    assert "generator" in inspect.signature(solver.step).parameters
    second = copy.deepcopy(solver)
    for each in (solver, second):
        each.set_timesteps(3)
    second.step(torch.zeros(1, 1), second.timesteps[0], torch.zeros(1, 1))
    assert (solver.step_index, second.step_index) == (None, 1) and told == [(1, 3)]
    solver.step(torch.zeros(1, 1), solver.timesteps[0], torch.zeros(1, 1))
    assert told[1:] == [(1, 3)], "two that step together count once"
    solver.set_timesteps(2)
    solver.step(torch.zeros(1, 1), solver.timesteps[0], torch.zeros(1, 1))
    assert told[2:] == [(2, 3)], "what begins another schedule goes on where the one before ended"
    assert takes_generator(solver.__class__) and not takes_generator(SOLVERS["UniPCMultistepScheduler"])
