"""A whole model: every component, then its pipeline."""

from __future__ import annotations

import logging
import time
from typing import Any

from torch import nn

from safelight.attention import set_attention_backend
from safelight.core.config import PipelineConfig
from safelight.core.pipeline import ComposedPipeline
from safelight.core.schema import ModelSchema
from safelight.core.server_args import ServerArgs
from safelight.errors import InvalidParameterError, ModelIndexError
from safelight.loading.components import component_target, load_component
from safelight.loading.repository import Repository, open_repository

logger = logging.getLogger(__name__)


def load_pipeline(server_args: ServerArgs) -> ComposedPipeline:
    """Load the model that `server_args` names.

    Raises:
        ModelError: if it cannot be loaded.
        InvalidParameterError: if a setting does not fit this machine or this model.

    """
    device = server_args.torch_device()
    repository = open_repository(server_args.model, server_args.revision)
    pipeline_cls = repository.pipeline.pipeline_cls()
    names = pipeline_cls.component_names()
    for component in server_args.component_dtypes:
        if component not in names:
            raise InvalidParameterError("component_dtypes", component, f"components of this model: {', '.join(names)}")
    targets = _targets(repository, pipeline_cls)
    config, schema = describe(repository)
    modules: dict[str, Any] = {}
    for name, target in targets.items():
        begun = time.perf_counter()
        dtype = server_args.component_dtype(name, config.precisions.get(name))
        modules[name] = load_component(repository.path / name, target, dtype, device)
        if isinstance(modules[name], nn.Module):
            set_attention_backend(modules[name], server_args.attention_backend, device.type, dtype)
        logger.info("%s: %s loaded in %.2f s", repository.name, name, time.perf_counter() - begun)
    return pipeline_cls(modules, config, schema, server_args)


def describe(repository: Repository) -> tuple[PipelineConfig, ModelSchema]:
    """Return a model's configuration and schema, from its JSON alone: no weights are read.

    Raises:
        ModelIndexError: if a component that the pipeline needs is not there.

    """
    pipeline_cls = repository.pipeline.pipeline_cls()
    configs = {name: repository.component_config(name) for name in _targets(repository, pipeline_cls)}
    configs["model_index"] = dict(repository.index)
    config = repository.pipeline.pipeline_config_cls().from_model(configs)
    schema = config.model_schema(
        repository.name, repository.pipeline.pipeline_name, repository.params_cls(), repository.sampling_defaults()
    )
    return config, schema


def _targets(repository: Repository, pipeline_cls: type[ComposedPipeline]) -> dict[str, str]:
    """Return `module:Class` of every component that there is."""
    targets: dict[str, str] = {}
    for name in pipeline_cls.component_names():
        target = component_target(repository, name, pipeline_cls.component_classes)
        if target is not None:
            targets[name] = target
        elif not pipeline_cls.is_optional(name):
            raise ModelIndexError(f"model_index.json: {name} is missing, and {pipeline_cls.pipeline_name} needs it")
    return targets
