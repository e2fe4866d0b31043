"""What the package's pipelines ask of their solver: read from their code, so that no list of pipelines is needed."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from inspect import Parameter
from typing import Any

from safelight.core.solver import Traits, parameters, scales_latents, scales_noise, schedule_traits

SOLVER = "scheduler"
_SOLVER = f"self.{SOLVER}"
_BEGINNINGS = frozenset({"init_noise_sigma", "add_noise", "scale_noise"})
"""What makes the first latents of noise, and of a picture."""
_ASKED_BY_USERS = frozenset({"timesteps"})
"""Keywords of a schedule that a call hands on only where it was given them."""


@dataclass(frozen=True)
class Demands:
    """What a pipeline's code does with `self.scheduler`.

    Attributes:
        attributes: that it uses, but those that it asks for first.
        calls: methods that it calls, each with the number of arguments without a name, and the names of the others.
        scheduled: names of arguments that others pass on to `set_timesteps`.
        makes_sigmas: whether it spaces the noise levels itself.
        classes: of solvers of which it makes its own, whatever it is given; empty where it takes that.
        leaves_flow_sigmas: whether it asks whether the solver has `use_flow_sigmas`.

    """

    attributes: frozenset[str | None]
    calls: tuple[tuple[str | None, int, frozenset[str]], ...]
    scheduled: frozenset[str]
    makes_sigmas: bool
    leaves_flow_sigmas: bool
    classes: frozenset[str]

    def traits(self, own: Any, solver: Any) -> Traits | None:
        """Return which lists of a schedule a solver takes of this pipeline; None where it lacks what is asked for.

        Args:
            own: the solver that the pipeline was loaded with: what that one lacks, the pipeline does without.
            solver: another; like the first it has a schedule.

        """
        if self.classes and type(solver).__name__ not in self.classes:
            return None
        if not self.attributes or (self.attributes & frozenset(dir(own))) - frozenset(dir(solver)):
            return None
        if any(_can(own, call) and not _can(solver, call) for call in self.calls):
            return None
        if scales_latents(solver) and "scale_model_input" not in self.attributes:
            return None
        if scales_noise(solver) and not _BEGINNINGS & self.attributes:
            return None
        takes, taken = parameters(type(own).set_timesteps), parameters(type(solver).set_timesteps)
        if (self.scheduled & takes.keys() - _ASKED_BY_USERS - {"sigmas"}) - taken.keys():
            return None
        makes = self.makes_sigmas and "sigmas" in takes
        return schedule_traits(solver, gives_sigmas=makes, gives_mu=False, leaves_flow_sigmas=self.leaves_flow_sigmas)


@functools.cache
def demands_of(pipeline_cls: type) -> Demands:
    """Return what a pipeline of the package, and the classes that it extends, asks of its solver."""
    nodes = list(_nodes(pipeline_cls))
    calls = [node for node in nodes if isinstance(node, ast.Call)]
    made = [node for node in calls if isinstance(node.func, ast.Attribute) and _is_solver(node.func.value)]
    handed = [node for node in calls if any(map(_is_solver, (*node.args, *(word.value for word in node.keywords))))]
    asked = {_text(node.args[1]) for node in handed if ast.unparse(node.func) == "hasattr"}
    own_calls = tuple((_attribute(node.func), len(node.args), _named(node) - _ASKED_BY_USERS) for node in made)
    return Demands(
        attributes=frozenset(map(_attribute, nodes)) - asked - {None},
        calls=tuple(call for call in own_calls if call[0] not in asked),
        scheduled=frozenset[str]().union(*map(_named, handed)),
        makes_sigmas=any(map(_makes_sigmas, nodes)),
        leaves_flow_sigmas="use_flow_sigmas" in map(_text, nodes),
        classes=frozenset().union(*map(_classes_made, nodes)),
    )


def _nodes(pipeline_cls: type) -> Iterator[ast.AST]:
    """Yield the parts of the code of a class, and of those in the package's folder of pipelines that it extends."""
    import diffusers

    for cls in pipeline_cls.__mro__:
        if cls is not diffusers.DiffusionPipeline and cls.__module__.startswith(f"{diffusers.__name__}.pipelines."):
            yield from ast.walk(ast.parse(textwrap.dedent(inspect.getsource(cls))))


def _is_solver(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and ast.unparse(node) == _SOLVER


def _attribute(node: ast.AST) -> str | None:
    """Return the name of what is used of the solver; None for anything else."""
    return node.attr if isinstance(node, ast.Attribute) and _is_solver(node.value) else None


def _text(node: ast.AST) -> str | None:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def _named(call: ast.Call) -> frozenset[str]:
    return frozenset(word.arg for word in call.keywords if word.arg)


def _classes_made(node: ast.AST) -> frozenset[str]:
    """Return the solvers that a constructor knows by name, where it makes one of another's configuration."""
    if not isinstance(node, ast.FunctionDef) or node.name != "__init__":
        return frozenset()
    inside = [part for statement in node.body for part in ast.walk(statement)]
    names = frozenset(part.id for part in inside if isinstance(part, ast.Name) and part.id.endswith("Scheduler"))
    makes = any(isinstance(part, ast.Attribute) and part.attr == "from_config" for part in inside)
    return names if makes else frozenset()


def _makes_sigmas(node: ast.AST) -> bool:
    """Say whether noise levels are computed here."""
    if not isinstance(node, ast.Assign) or not any(ast.unparse(target) == "sigmas" for target in node.targets):
        return False
    return any(isinstance(part, ast.Call) for part in ast.walk(node.value))


def _can(solver: Any, call: tuple[str | None, int, frozenset[str]]) -> bool:
    """Say whether a method of a solver can be called so."""
    method, num_unnamed, named = call
    if method not in dir(type(solver)):
        return False
    takes = list(parameters(getattr(type(solver), str(method))).values())[1:]
    kinds, names = [each.kind for each in takes], {each.name for each in takes}
    enough = Parameter.VAR_POSITIONAL in kinds or num_unnamed <= kinds.count(Parameter.POSITIONAL_OR_KEYWORD)
    return enough and (Parameter.VAR_KEYWORD in kinds or named <= names)
