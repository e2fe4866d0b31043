"""The solvers of one call of a pipeline: its own, which draw from the request's seed, and whose steps are counted."""

from __future__ import annotations

import copy
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

    def begin(self) -> None:
        """Note that a solver has set its schedule."""
        self._before = self._before + max(self._done.values(), default=0)
        self._done = {}

    def count(self, solver: Any) -> None:
        """Note that a solver has made a step."""
        self._done[id(solver)] = self._done.get(id(solver), 0) + 1
        done = self._before + max(self._done.values())
        timesteps = solver.timesteps
        self._tell(done, max(done, self._before + (0 if timesteps is None else len(timesteps))))

    def __deepcopy__(self, memo: dict[int, Any]) -> Steps:
        """Pipelines copy their solvers; the steps of a copy are the same call's."""
        return self


def own_solver(solver: Any, steps: Steps) -> Any:
    """Return a copy of a solver whose steps are counted, and draw from the request's own generator.

    It is of the solver's very class, which some pipelines ask for; what is copied of it in its turn steps itself.
    """
    own = copy.deepcopy(solver)
    for name in ("set_timesteps", "step", "step_pred"):  # those of stochastic differential equations have the last
        if name in dir(solver.__class__):
            vars(own)[name] = Counted(own, name, steps)
    return own


class Counted:
    """A method of a solver, which tells of the steps.

    Args:
        solver: whose it is.
        name: `set_timesteps`, or one that makes a step.
        steps: of the call.

    """

    def __init__(self, solver: Any, name: str, steps: Steps) -> None:
        self._solver, self._method, self._steps = solver, getattr(solver.__class__, name), steps
        parameters = list(inspect.signature(self._method).parameters.values())[1:]
        self.__signature__ = inspect.Signature(parameters)  # pipelines look at what it takes
        names = [parameter.name for parameter in parameters]
        self._generator_place = names.index("generator") if "generator" in names else None
        self._begins = name == "set_timesteps"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Do what the solver does."""
        place = self._generator_place
        if place is not None and len(args) <= place and kwargs.get("generator") is None:
            kwargs["generator"] = self._steps.generator
        made = self._method(self._solver, *args, **kwargs)
        if self._begins:
            self._steps.begin()
        else:
            self._steps.count(self._solver)
        return made
