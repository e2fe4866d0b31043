"""A whole model: every component, then its pipeline."""

from __future__ import annotations

import dataclasses
import functools
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from safelight.acceleration.apply import accelerate
from safelight.acceleration.exclusions import refuse_excluded
from safelight.acceleration.memory import DeviceMemory
from safelight.acceleration.offload import offload
from safelight.acceleration.plan import MemoryPlan
from safelight.acceleration.tiled_vae import tile_decoding
from safelight.attention import set_attention_backend
from safelight.backends import components, diffusers
from safelight.core.architecture import NETWORKS, Architecture
from safelight.core.device import on_device
from safelight.core.pipeline import ComposedPipeline
from safelight.core.registry import resolve_class
from safelight.core.schema import ModelSchema
from safelight.core.server_args import ServerArgs
from safelight.errors import InvalidParameterError, UsageError
from safelight.loading.alignment import align_weights
from safelight.loading.bounds import bounded
from safelight.loading.classes import library_of
from safelight.loading.components import (
    check_weights,
    empty_component,
    in_words,
    load_component,
    quiet,
    unused_settings,
)
from safelight.loading.description import configure, sources
from safelight.loading.digest import weights_digest
from safelight.loading.planning import device_memory, plan_memory
from safelight.loading.repository import Repository, open_for
from safelight.loading.stage_memory import count_memory
from safelight.loading.trials import check_all_steps, check_tokens_fit
from safelight.parallel.apply import share, waits_on_host
from safelight.parallel.mesh import Mesh, lone_mesh
from safelight.parallel.plans import tensor_plan
from safelight.parallel.tensor import connect_shards

logger = logging.getLogger(__name__)
memory_logger = logging.getLogger("safelight.memory")
"""Of the plan at start, which the commands print."""
HOST = torch.device("cpu")


def load_pipeline(
    server_args: ServerArgs, memory: DeviceMemory | None = None, mesh: Mesh | None = None
) -> ComposedPipeline:
    """Load the model that `server_args` names.

    Args:
        server_args: what is set for the engine.
        memory: where components run that wait on the host until they are used; the device's unless given.
        mesh: of the ranks that load it together; None for one device.

    Raises:
        ModelError: if it cannot be loaded.
        InvalidParameterError: if a setting does not fit this machine or this model.

    """
    refuse_excluded(server_args)
    memory = memory or device_memory(server_args)
    repository = open_for(server_args)
    for note in repository.notes:
        logger.warning("%s", note)
    if repository.variant is not None:
        logger.info("%s: weights of variant %s", repository.name, repository.variant)
    limit = server_args.memory_limit_bytes()
    if memory is not None and limit is not None:
        memory.limit(limit)
    if (mesh or lone_mesh()).layout.num_devices != server_args.num_devices():
        raise UsageError("a model on several devices is loaded by as many ranks, which this process does not belong to")
    with on_device(server_args.torch_device()):
        return _LOADERS[repository.pipeline.backend](repository, server_args, memory, mesh or lone_mesh())


def describe(repository: Repository) -> ModelSchema:
    """Return what a model takes, from its JSON alone: no weights are read.

    Raises:
        ModelIndexError: if a component that the pipeline needs is not there, or is described by wrong values.

    """
    if repository.pipeline.backend == "native":
        return configure(repository)[1]
    schema = diffusers.describe(
        repository.name, repository.pipeline.pipeline_name, repository.params_cls(), repository.notes
    )
    configs = {name: repository.component_config(name) for name in NETWORKS if name in repository.component_names()}
    return dataclasses.replace(schema, architecture=Architecture.of(configs))


def _load_diffusers(
    repository: Repository, server_args: ServerArgs, memory: DeviceMemory | None, mesh: Mesh
) -> ComposedPipeline:
    files: list[Path] = []
    for name in repository.component_names():
        folder = repository.path / name
        cls = components.check_component(repository.path, name, repository.index[name])
        stem = components.checkpoint_stem(cls)
        if stem is not None:
            files += check_weights(folder, (stem,), repository.component_variant(name))
        warn_of_unused(folder, cls)
    for setting in ("offload", "vae_tiling"):
        value = vars(server_args)[setting]
        if value != "none":
            raise InvalidParameterError(setting, value, "none for a model run by the diffusers package")
    with in_words(repository.pipeline.pipeline_name), quiet(), bounded(repository.name, files):
        pipeline = diffusers.load(repository.path, describe(repository), server_args, repository.variant)
        parts = pipeline.get_module("pipeline").components
        check_all_steps(parts)
        check_tokens_fit(parts)
    return pipeline


def _load_native(
    repository: Repository, server_args: ServerArgs, memory: DeviceMemory | None, mesh: Mesh
) -> ComposedPipeline:
    pipeline_cls = repository.pipeline.pipeline_cls()
    _check_component_dtypes(server_args, pipeline_cls.component_names())
    config, schema = configure(repository)
    plan = _plan_for_device(repository, server_args, memory)
    tiled = server_args.vae_tiling == "exact" or (plan is not None and plan.tiled)
    placed = frozenset(() if plan is None else plan.placed)
    modules: dict[str, Any] = {}
    empty: dict[str, Callable[[], nn.Module]] = {}
    # Our own classes first: they are mapped in no time, and tell whether the settings fit the model.
    found = sources(repository, pipeline_cls).items()
    for name, source in sorted(found, key=lambda item: library_of(item[1].target) is not None):
        begun = time.perf_counter()
        dtype = server_args.component_dtype(name, config.precisions.get(name))
        home = HOST if name in placed or waits_on_host(name, mesh) else server_args.torch_device()
        modules[name] = load_component(source, dtype, home, (mesh.tp.rank, mesh.tp.size))
        warn_of_unused(source.folder, resolve_class(source.target))
        if isinstance(modules[name], nn.Module):
            # Bands walk the library's own modules, which faster ones would replace.
            in_bands = name == "vae" and (tiled or mesh.layout.vae)
            empty[name] = functools.partial(empty_component, source, dtype)
            kernels = "plain" if in_bands else server_args.kernels
            _prepare(modules[name], server_args, dtype, kernels, mesh, name in placed)
        logger.info("%s: %s loaded in %.2f s", repository.name, name, time.perf_counter() - begun)
    check_tokens_fit(modules)
    pipeline = pipeline_cls(modules, config, schema, server_args)
    pipeline.empty_components = empty
    pipeline.count_memory = functools.partial(count_memory, repository, server_args, tiled)
    pipeline.conditioning_cache.weights |= {name: weights_digest(repository.path / name) for name in empty}
    share(pipeline, mesh)
    if tiled:
        tile_decoding(pipeline)
    if plan is not None and memory is not None:
        pipeline.residency = offload(modules, plan.placed, plan.rooms, plan.resident_blocks, memory)
    return pipeline


def _check_component_dtypes(server_args: ServerArgs, names: Sequence[str]) -> None:
    """Refuse the dtype of a component that there is not."""
    for component in server_args.component_dtypes:
        if component not in names:
            raise InvalidParameterError("component_dtypes", component, f"components of this model: {', '.join(names)}")


def warn_of_unused(folder: Path, cls: Any) -> None:
    """Log which settings of a component have no effect, because its class does not know them."""
    for name in unused_settings(folder, cls):
        logger.warning("%s: %s does not know %r in its configuration: left out", folder.name, cls.__name__, name)


def _prepare(
    module: nn.Module, server_args: ServerArgs, dtype: torch.dtype, kernels: str, mesh: Mesh, placed: bool
) -> None:
    """Lay a component's weights, choose what it computes by, and connect its shards to those of other ranks."""
    device = server_args.torch_device()
    if device == HOST and not placed:  # elsewhere, and where it comes and goes, weights are copied before they are used
        align_weights(module)
    set_attention_backend(module, server_args.attention_backend, device.type, dtype)
    accelerate(module, kernels, device, dtype)
    if tensor_plan(module) is not None:
        connect_shards(module, mesh.tp)


def _plan_for_device(repository: Repository, server_args: ServerArgs, memory: DeviceMemory | None) -> MemoryPlan | None:
    """Return the plan for the memory that there is, and log it; None where nothing is asked of it."""
    if memory is None or (server_args.offload == "none" and server_args.memory_limit is None):
        return None
    plan = plan_memory(repository, server_args, server_args.memory_limit_bytes() or memory.free())
    for line in plan.lines():
        memory_logger.info("%s", line)
    return plan


_LOADERS: Mapping[str, Callable[[Repository, ServerArgs, DeviceMemory | None, Mesh], ComposedPipeline]] = {
    "native": _load_native,
    diffusers.FAMILY: _load_diffusers,
}
