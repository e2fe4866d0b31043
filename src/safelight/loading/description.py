"""What a repository's JSON says of its model: components, configuration and schema, without weights."""

from __future__ import annotations

from dataclasses import replace

from safelight.backends import diffusers
from safelight.core.architecture import NETWORKS, Architecture
from safelight.core.config import PipelineConfig
from safelight.core.pipeline import ComposedPipeline
from safelight.core.schema import ModelSchema
from safelight.errors import ModelIndexError, in_one_line
from safelight.loading.classes import Source, target_of
from safelight.loading.repository import Repository


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
    return config, schema


def describe_package(repository: Repository) -> ModelSchema:
    """Return what a model takes that the diffusers package runs, from its JSON alone."""
    entry = repository.pipeline
    schema = diffusers.describe(repository.name, entry.pipeline_name, entry.sampling_param_cls(), repository.notes)
    configs = {name: repository.component_config(name) for name in NETWORKS if name in repository.component_names()}
    return replace(schema, architecture=Architecture.of(configs))


def sources(repository: Repository, pipeline_cls: type[ComposedPipeline]) -> dict[str, Source]:
    """Return the class and the place of every component that there is."""
    found: dict[str, Source] = {}
    for name in pipeline_cls.component_names():
        class_name = repository.component_class_name(name)
        if class_name is not None:
            found[name] = Source(
                folder=repository.path / name,
                target=target_of(name, class_name, pipeline_cls.component_classes),
                variant=repository.component_variant(name),
                optional_parts=pipeline_cls.optional_parts.get(name, ()),
            )
        elif not pipeline_cls.is_optional(name):
            raise ModelIndexError(f"model_index.json: {name} is missing, and {pipeline_cls.pipeline_name} needs it")
    return found
