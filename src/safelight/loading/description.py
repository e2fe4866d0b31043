"""What a repository's JSON says of its model: components, configuration and schema, without weights."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

from safelight.backends import components, diffusers
from safelight.core.architecture import NETWORKS, Architecture
from safelight.core.config import PipelineConfig
from safelight.core.package_params import PackageParams
from safelight.core.pipeline import ComposedPipeline
from safelight.core.registry import resolve_class
from safelight.core.schema import ModelSchema
from safelight.core.solver import Use, solver_choices
from safelight.errors import ModelIndexError, in_one_line
from safelight.loading.classes import Source, target_of
from safelight.loading.components import in_words, quiet
from safelight.loading.repository import Repository

SOLVER = "scheduler"


def configure(repository: Repository) -> tuple[PipelineConfig, ModelSchema]:
    """Return a model's configuration and schema, from its JSON alone: no weights are read.

    Raises:
        ModelIndexError: if a component that the pipeline needs is not there, or is described by wrong values.

    """
    entry = repository.pipeline
    configs = {name: repository.component_config(name) for name in sources(repository, entry.pipeline_cls())}
    configs["model_index"] = dict(repository.index)
    try:
        config = entry.pipeline_config_cls().from_model(configs)
        schema = config.model_schema(
            repository.name, entry.pipeline_name, entry.sampling_param_cls(), repository.sampling_defaults()
        )
        schema = replace(schema, architecture=Architecture.of(configs))
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        wrong = f"{repository.name}: a component's configuration has a wrong value"
        raise ModelIndexError(f"{wrong}: {in_one_line(error)}") from error
    found = sources(repository, entry.pipeline_cls()).get(SOLVER)
    if found is not None:
        (solvers,) = solvers_of(repository, resolve_class(found.target), config.takes_solver)
        schema = replace(schema, solvers=solvers)
    return config, schema


def describe_package(repository: Repository) -> ModelSchema:
    """Return what a model takes that the diffusers package runs, from its JSON alone."""
    entry = repository.pipeline
    params_cls = entry.sampling_param_cls()
    schema = diffusers.describe(repository.name, entry.pipeline_name, params_cls, repository.notes)
    names = repository.component_names()
    configs = {name: repository.component_config(name) for name in NETWORKS if name in names}
    by_task: dict[str, dict[str, tuple[str, ...]]] = {}
    if SOLVER in names:
        cls = components.check_component(repository.folder(SOLVER), SOLVER, repository.index[SOLVER])
        assert issubclass(params_cls, PackageParams)
        class_names = [task.pipeline_name for task in params_cls.tasks]
        uses = [functools.partial(diffusers.takes_solver, name) for name in class_names]
        by_task = dict(zip(class_names, solvers_of(repository, cls, *uses), strict=True))
    own = by_task.pop(entry.pipeline_name, {})
    return replace(schema, architecture=Architecture.of(configs), solvers=own, task_solvers=by_task)


def solvers_of(repository: Repository, cls: Any, *uses: Use) -> list[dict[str, tuple[str, ...]]]:
    """Return the solvers that a model runs with beside its own, as `solver_choices`, from its JSON alone.

    Args:
        repository: the model.
        cls: of its own solver.
        uses: what each of its loops makes of another.

    Raises:
        ModelError: if its own cannot be built.

    """
    with in_words(f"{SOLVER}: {cls.__name__}"), quiet():
        return solver_choices(cls.from_config(repository.component_config(SOLVER)), *uses)


def sources(repository: Repository, pipeline_cls: type[ComposedPipeline]) -> dict[str, Source]:
    """Return the class and the place of every component that there is."""
    found: dict[str, Source] = {}
    for name in pipeline_cls.component_names():
        class_name = repository.component_class_name(name)
        if class_name is not None:
            found[name] = Source(
                folder=repository.folder(name),
                target=target_of(name, class_name, pipeline_cls.component_classes),
                variant=repository.component_variant(name),
                optional_parts=pipeline_cls.optional_parts.get(name, ()),
            )
        elif not pipeline_cls.is_optional(name):
            raise ModelIndexError(f"model_index.json: {name} is missing, and {pipeline_cls.pipeline_name} needs it")
    return found
