"""A seed is a seed: with every solver that a family accepts, whatever else draws from torch's own generator."""

from __future__ import annotations

import inspect
import json
import shutil

import torch

from safelight import ServerArgs
from safelight.core.executor import Execution
from safelight.core.registry import resolve_class
from safelight.loading.classes import LIBRARY_CLASSES
from safelight.loading.loader import load_pipeline
from tests.families.conftest import requests

SOLVERS = {
    name: solver
    for name, target in LIBRARY_CLASSES.items()
    if hasattr(solver := resolve_class(target), "set_timesteps")
}
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
"""What makes a solver of other models one of flow matching, where it has the option."""
OPTIONS_OF_NOISE = {"stochastic_sampling": True, "algorithm_type": "sde-dpmsolver++"}
"""Options by which a solver draws noise at each step."""
WITHOUT_SOLVER = ("WanDMDPipeline",)
"""Pipelines whose loop steps by itself, whatever solver the repository has."""


def configurations(solver, **fixed):
    """Return configurations of a solver class: with each option of noise that it has, and with none."""
    options = inspect.signature(solver.__init__).parameters
    fixed = {name: value for name, value in fixed.items() if name in options}
    return [fixed, *({**fixed, name: value} for name, value in OPTIONS_OF_NOISE.items() if name in options)]


def is_noisy(config):
    return bool(OPTIONS_OF_NOISE.items() & config.items())


def solvers_of(recipe):
    """Return the solvers that a recipe's pipeline is tried with: class names and configurations."""
    for name, solver in SOLVERS.items():
        for config in configurations(solver, **FLOW):
            yield name, config


def with_solver(folder, name, config, target):
    """Return a copy of a repository with another solver."""
    shutil.copytree(folder, target)
    shutil.rmtree(target / "scheduler")
    SOLVERS[name](**config).save_pretrained(target / "scheduler")
    index = json.loads((target / "model_index.json").read_text())
    (target / "model_index.json").write_text(json.dumps({**index, "scheduler": ["diffusers", name]}))
    return target


def run_disturbed(pipeline, fields, disturbance):
    """Return what a request makes while something else seeds torch's own generator before each of its units."""
    (req,) = requests(pipeline, fields)
    with Execution(pipeline, req) as execution:
        torch.manual_seed(disturbance)
        while execution.advance():
            torch.manual_seed(disturbance + req.step_index)
    return req.outputs[0]


def test_a_seed_is_a_seed(recipe, models, tmp_path):
    fields = {**recipe.cases[0].fields, "seed": 3}
    made = {}
    for number, (name, config) in enumerate(solvers_of(recipe)):
        folder = with_solver(models.folder(recipe), name, config, tmp_path / str(number))
        pipeline = load_pipeline(ServerArgs(str(folder), device="cpu"))
        first, second = (run_disturbed(pipeline, fields, disturbance) for disturbance in (1, 1000))
        assert torch.equal(first, second), f"{name} {config}"
        assert not torch.equal(first, run_disturbed(pipeline, {**fields, "seed": 4}, 1))
        made[name, is_noisy(config)] = first
    for name, noisy in made:
        if noisy and recipe.pipeline_name not in WITHOUT_SOLVER:
            assert not torch.equal(made[name, True], made[name, False]), f"{name} drew no noise"
    assert any(noisy for _, noisy in made)
