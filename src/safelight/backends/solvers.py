"""The solvers of one call of a pipeline: its own, which draw from the request's seed, and whose steps are counted."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch


class Steps:
    """Counts the steps of one call, whichever of its solvers make them.

    A solver that begins a schedule goes on where the steps before ended; two that step together, of picture and sound,
    count once.

    Args:
        generator: what solvers draw their noise from, unless the pipeline hands them another: many hand none.
        tell: is given (steps done, steps in all as far as is known) after each step.

    """

    def __init__(self, generator: torch.Generator, tell: Callable[[int, int], None]) -> None:
        self.generator = generator
        self._tell = tell
        self._before = 0
        self._done: dict[int, int] = {}

    def begin(self, solver: Any) -> None:
        """A solver has set its schedule."""
        self._before = self._before + max(self._done.values(), default=0)
        self._done = {}

    def count(self, solver: Any) -> None:
        """A solver has made a step."""
        self._done[id(solver)] = self._done.get(id(solver), 0) + 1
        done = self._before + max(self._done.values())
        timesteps = solver.timesteps
        self._tell(done, max(done, self._before + (0 if timesteps is None else len(timesteps))))

    def __deepcopy__(self, memo: dict[int, Any]) -> Steps:
        """Pipelines copy their solvers; the steps of a copy are the same call's."""
        return self


def own_solver(solver: Any, steps: Steps) -> Any:
    """Return a copy of a solver whose steps are counted, and draw from the request's own generator."""
    own = copy.deepcopy(solver)
    own.__class__ = _counting(solver.__class__)
    vars(own)[_STEPS] = steps
    return own


_STEPS = "steps_of_the_call"
_STEPPING = ("step", "step_pred")
"""Methods that make a step; solvers of stochastic differential equations correct it by another one before."""


@functools.cache
def _counting(cls: Any) -> Any:
    """Return a class that is a solver's, but that says when it sets a schedule and makes a step."""
    members = {name: _counted(getattr(cls, name)) for name in _STEPPING if name in dir(cls)}
    if "set_timesteps" in dir(cls):
        members["set_timesteps"] = _begun(cls.set_timesteps)
    return type(cls.__name__, (cls,), {**members, "__module__": cls.__module__, "__doc__": cls.__doc__})


def _counted(method: Callable[..., Any]) -> Callable[..., Any]:
    names = list(inspect.signature(method).parameters)
    place = names.index("generator") if "generator" in names else None

    @functools.wraps(method)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        steps: Steps = vars(self)[_STEPS]
        if place is not None and len(args) < place and kwargs.get("generator") is None:
            kwargs["generator"] = steps.generator
        made = method(self, *args, **kwargs)
        steps.count(self)
        return made

    return step


def _begun(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> None:
        method(self, *args, **kwargs)
        vars(self)[_STEPS].begin(self)

    return set_timesteps
