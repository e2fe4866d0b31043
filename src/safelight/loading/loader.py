"""A whole model: every component, then its pipeline."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from safelight.attention import set_attention_backend
from safelight.backends import diffusers
from safelight.core.config import PipelineConfig
from safelight.core.pipeline import ComposedPipeline
from safelight.core.schema import ModelSchema
from safelight.core.server_args import ServerArgs
from safelight.errors import InvalidParameterError, ModelIndexError
from safelight.loading.checkpoint import WEIGHT_SUFFIXES
from safelight.loading.components import (
    LIBRARY_STEMS,
    check_library_files,
    component_target,
    in_words,
    library_of,
    load_component,
    quiet,
)
from safelight.loading.digest import weights_digest
from safelight.loading.repository import Repository, open_repository

logger = logging.getLogger(__name__)


def load_pipeline(server_args: ServerArgs) -> ComposedPipeline:
    """Load the model that `server_args` names.

    Raises:
        ModelError: if it cannot be loaded.
        InvalidParameterError: if a setting does not fit this machine or this model.

    """
    server_args.torch_device()  # a device that there is not is refused before anything is downloaded
    repository = open_repository(server_args.model, server_args.revision, backend=server_args.backend)
    for note in repository.notes:
        logger.warning("%s", note)
    return _LOADERS[repository.pipeline.backend](repository, server_args)


def describe(repository: Repository) -> ModelSchema:
    """Return what a model takes, from its JSON alone: no weights are read.

    Raises:
        ModelIndexError: if a component that the pipeline needs is not there, or is described by wrong values.

    """
    if repository.pipeline.backend == "native":
        return _configure(repository)[1]
    return diffusers.describe(
        repository.name, repository.pipeline.pipeline_name, repository.params_cls(), repository.notes
    )


def _load_diffusers(repository: Repository, server_args: ServerArgs) -> ComposedPipeline:
    for name in repository.component_names():
        entry, folder = repository.index[name], repository.path / name
        diffusers.check_component(repository.path, name, entry)
        if any(path.suffix in WEIGHT_SUFFIXES for path in folder.glob("*")):
            check_library_files(folder, LIBRARY_STEMS.get(entry[0], LIBRARY_STEMS[diffusers.FAMILY]))
    if server_args.offload != "none":
        raise InvalidParameterError("offload", server_args.offload, "none for a model run by the diffusers package")
    with in_words(repository.pipeline.pipeline_name), quiet():
        return diffusers.load(repository.path, describe(repository), server_args)


def _load_native(repository: Repository, server_args: ServerArgs) -> ComposedPipeline:
    device = server_args.torch_device()
    pipeline_cls = repository.pipeline.pipeline_cls()
    names = pipeline_cls.component_names()
    for component in server_args.component_dtypes:
        if component not in names:
            raise InvalidParameterError("component_dtypes", component, f"components of this model: {', '.join(names)}")
    targets = _targets(repository, pipeline_cls)
    config, schema = _configure(repository)
    swapped = pipeline_cls.swapped_components(server_args)
    if server_args.offload != "none" and not (swapped and targets.keys() >= set(swapped)):
        raise InvalidParameterError("offload", server_args.offload, "none for this model, which has one transformer")
    modules: dict[str, Any] = {}
    # Our own classes first: they are mapped in no time, and tell whether the settings fit the model.
    for name, target in sorted(targets.items(), key=lambda item: library_of(item[1]) is not None):
        begun = time.perf_counter()
        dtype = server_args.component_dtype(name, config.precisions.get(name))
        modules[name] = load_component(
            repository.path / name, target, dtype, torch.device("cpu") if name in swapped else device
        )
        if isinstance(modules[name], nn.Module):
            set_attention_backend(modules[name], server_args.attention_backend, device.type, dtype)
        logger.info("%s: %s loaded in %.2f s", repository.name, name, time.perf_counter() - begun)
    pipeline = pipeline_cls(modules, config, schema, server_args)
    pipeline.conditioning_cache.weights |= {name: weights_digest(repository.path / name) for name in pipeline.modules()}
    return pipeline


def _configure(repository: Repository) -> tuple[PipelineConfig, ModelSchema]:
    """Return a model's configuration and schema, from its JSON alone: no weights are read.

    Raises:
        ModelIndexError: if a component that the pipeline needs is not there, or is described by wrong values.

    """
    pipeline_cls = repository.pipeline.pipeline_cls()
    configs = {name: repository.component_config(name) for name in _targets(repository, pipeline_cls)}
    configs["model_index"] = dict(repository.index)
    try:
        config = repository.pipeline.pipeline_config_cls().from_model(configs)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ModelIndexError(f"{repository.name}: a component's configuration has a wrong value: {reason}") from error
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


_LOADERS: Mapping[str, Callable[[Repository, ServerArgs], ComposedPipeline]] = {
    "native": _load_native,
    diffusers.FAMILY: _load_diffusers,
}
