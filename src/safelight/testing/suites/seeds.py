"""A seed is a seed: with every solver that a family accepts, whatever else draws from torch's own generator."""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from safelight.core.executor import Execution
from safelight.core.pipeline import ComposedPipeline
from safelight.core.registry import resolve_class
from safelight.loading.classes import LIBRARY_CLASSES
from safelight.testing.models import TinyModels, load, requests
from safelight.testing.recipes import Recipe
from safelight.testing.suites.suite import Suite

FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
"""What makes a solver of other models one of flow matching, where it has the option."""
OPTIONS_OF_NOISE = {"stochastic_sampling": True, "algorithm_type": "sde-dpmsolver++"}
"""Options by which a solver draws noise at each step."""


class SeedsSuite(Suite):
    """Seeds, with every solver."""

    def test_a_seed_is_a_seed(self, recipe: Recipe, tiny_models: TinyModels, tmp_path: Path) -> None:
        """The same bytes, while something else seeds torch's own generator before each unit."""
        fields = {**recipe.cases[0].fields, "seed": 3}
        made = {}
        for number, (name, config) in enumerate(solvers()):
            folder = with_solver(tiny_models.folder(recipe), name, config, tmp_path / str(number))
            pipeline = load(folder)
            first, second = (run_disturbed(pipeline, fields, disturbance) for disturbance in (1, 1000))
            assert torch.equal(first, second), f"{name} {config}"
            assert not torch.equal(first, run_disturbed(pipeline, {**fields, "seed": 4}, 1))
            made[name, is_noisy(config)] = first
        for name, noisy in made:
            if noisy and recipe.has_solver:
                assert not torch.equal(made[name, True], made[name, False]), f"{name} drew no noise"
        assert any(noisy for _, noisy in made)


def solver_classes() -> dict[str, Any]:
    """Return the solvers of the libraries that families may have, by class name."""
    classes = {name: resolve_class(target) for name, target in LIBRARY_CLASSES.items()}
    return {name: found for name, found in classes.items() if hasattr(found, "set_timesteps")}


def configurations(solver: Any, **fixed: Any) -> list[dict[str, Any]]:
    """Return configurations of a solver class: with each option of noise that it has, and with none."""
    options = inspect.signature(solver.__init__).parameters
    fixed = {name: value for name, value in fixed.items() if name in options}
    return [fixed, *({**fixed, name: value} for name, value in OPTIONS_OF_NOISE.items() if name in options)]


def is_noisy(config: Mapping[str, Any]) -> bool:
    """Say whether a solver of a configuration draws noise."""
    return bool(OPTIONS_OF_NOISE.items() & config.items())


def solvers() -> Iterator[tuple[str, dict[str, Any]]]:
    """Return the solvers that a pipeline is tried with: class names and configurations."""
    for name, solver in solver_classes().items():
        for config in configurations(solver, **FLOW):
            yield name, config


def with_solver(folder: Path, name: str, config: Mapping[str, Any], target: Path) -> Path:
    """Return a copy of a repository with another solver."""
    shutil.copytree(folder, target)
    shutil.rmtree(target / "scheduler")
    solver_classes()[name](**config).save_pretrained(target / "scheduler")
    index = json.loads((target / "model_index.json").read_text())
    (target / "model_index.json").write_text(json.dumps({**index, "scheduler": ["diffusers", name]}))
    return target


def run_disturbed(pipeline: ComposedPipeline, fields: Mapping[str, Any], disturbance: int) -> Tensor:
    """Return what a request makes while something else seeds torch's own generator before each of its units."""
    (req,) = requests(pipeline, fields)
    with Execution(pipeline, req) as execution:
        torch.manual_seed(disturbance)
        while execution.advance():
            torch.manual_seed(disturbance + req.step_index)
    made: Tensor = req.outputs[0]
    return made
