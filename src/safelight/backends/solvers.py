"""The solvers of one call of a pipeline: its own, and drawing their noise from the request's seed."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch

from safelight.core.solver import takes_generator


def give_own_solvers(pipe: Any, generator: torch.Generator) -> None:
    """Put copies of all its solvers into a pipeline, which is itself a copy, in place.

    Their `step` draws from `generator` unless the pipeline hands it another: many hand it none.
    """
    import diffusers

    for name, component in pipe.components.items():
        if not isinstance(component, diffusers.SchedulerMixin):
            continue
        solver = copy.deepcopy(component)
        if takes_generator(solver.__class__):
            # A partial of the class's function, which a pipeline that copies its solver can copy along.
            step = functools.partial(type(solver).step, solver, generator=generator)
            vars(solver)["step"] = step
        setattr(pipe, name, solver)
