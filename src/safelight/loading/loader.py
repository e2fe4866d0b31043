"""A whole model: every component, then its pipeline."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from safelight.acceleration.apply import cpu_routes
from safelight.acceleration.memory import DeviceMemory
from safelight.acceleration.offload import offload
from safelight.acceleration.plan import MemoryPlan
from safelight.backends import components, diffusers
from safelight.backends.attention import set_attention_backend
from safelight.backends.borrowing import names_of_networks
from safelight.core.components import Components
from safelight.core.device import on_device
from safelight.core.pipeline import ComposedPipeline
from safelight.core.residency import Residency
from safelight.core.schema import ModelSchema
from safelight.core.server_args import ServerArgs
from safelight.errors import InvalidParameterError, UsageError
from safelight.loading.bounds import bounded
from safelight.loading.component_plan import plan_components
from safelight.loading.components import check_weights, in_words, quiet, warn_of_unused
from safelight.loading.description import configure, describe_package
from safelight.loading.files import weights_digest
from safelight.loading.planning import device_memory, plan_memory, refuse_excluded
from safelight.loading.repository import Repository, open_for
from safelight.loading.stage_memory import count_memory
from safelight.loading.trials import check_steps, check_tokens_fit
from safelight.loading.vaes import package_vae, run_vae
from safelight.parallel.apply import over_ranks, share
from safelight.parallel.mesh import Mesh, lone_mesh
from safelight.stages.vae import VAE

logger = logging.getLogger(__name__)
memory_logger = logging.getLogger("safelight.memory")
"""Of the plan at start, which the commands print."""


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
        if repository.pipeline.backend == "native":
            return _load_native(repository, server_args, memory, mesh or lone_mesh())
        return _load_diffusers(repository, server_args, memory)


def describe(repository: Repository) -> ModelSchema:
    """Return what a model takes, from its JSON alone: no weights are read.

    Raises:
        ModelIndexError: if a component that the pipeline needs is not there, or is described by wrong values.

    """
    if repository.pipeline.backend == "native":
        return configure(repository)[1]
    return describe_package(repository)


def _load_diffusers(repository: Repository, server_args: ServerArgs, memory: DeviceMemory | None) -> ComposedPipeline:
    files: list[Path] = []
    weights: dict[str, str] = {}
    apart: dict[str, Any] = {}
    for name in repository.component_names():
        folder = repository.folder(name)
        cls = components.check_component(folder, name, repository.index[name])
        stem = components.checkpoint_stem(cls)
        if stem is not None:
            files += check_weights(folder, (stem,), repository.component_variant(name))
            weights[name] = weights_digest(folder)
        if name in repository.elsewhere or components.is_taken_apart(cls):
            apart[name] = cls
        warn_of_unused(folder, cls)
    _check_names(server_args, repository.component_names())
    schema = describe(repository)
    plan = _plan_for_device(repository, server_args, memory)
    name = repository.pipeline.pipeline_name
    with in_words(name), quiet(), bounded(repository.name, files):
        given = {
            each: components.load_component(
                cls, repository.folder(each), server_args.component_dtype(each), repository.component_variant(each)
            )
            for each, cls in apart.items()
        }
        pipe = diffusers.load(repository.path, name, server_args, repository.variant, given)
        for each, component in pipe.components.items():
            check_steps(component, each)
        check_tokens_fit(pipe.components)
    modules = names_of_networks(pipe)
    placed = () if plan is None else plan.placed
    for each, module in modules.items():
        if each not in placed:
            module.to(server_args.torch_device())
    set_attention_backend(modules, server_args.attention_backend, server_args.torch_device())
    tiled = server_args.vae_tiling == "exact" or (plan is not None and plan.tiled)
    return diffusers.assemble(
        Components(
            {"pipeline": pipe, **modules},
            vae=package_vae(modules, tiled),
            residency=_placed(modules, plan, memory),
            weights=weights,
            count_memory=functools.partial(count_memory, repository, server_args, tiled),
        ),
        schema,
        server_args,
    )


def _load_native(
    repository: Repository, server_args: ServerArgs, memory: DeviceMemory | None, mesh: Mesh
) -> ComposedPipeline:
    pipeline_cls = repository.pipeline.pipeline_cls()
    names = pipeline_cls.component_names()
    _check_names(server_args, names)
    config, schema = configure(repository)
    plan = _plan_for_device(repository, server_args, memory)
    tiled = server_args.vae_tiling == "exact" or (plan is not None and plan.tiled)
    placed = frozenset(() if plan is None else plan.placed)
    plans = plan_components(repository, pipeline_cls, config, server_args, mesh, placed, tiled or mesh.layout.vae)
    modules: dict[str, Any] = {}
    for each in plans:
        begun = time.perf_counter()
        modules[each.name] = each.load()
        logger.info("%s: %s loaded in %.2f s", repository.name, each.name, time.perf_counter() - begun)
    empty = {each.name: each.empty for each in plans if isinstance(modules[each.name], nn.Module)}
    check_tokens_fit(modules)
    sharing = share(modules, mesh, server_args.torch_device())
    vae = _vae(modules, server_args, tiled, mesh)
    residency = _placed(modules, plan, memory)
    components = Components(
        modules,
        vae=vae,
        residency=residency,
        weights={name: weights_digest(repository.folder(name)) for name in empty},
        empty=empty,
        count_memory=functools.partial(count_memory, repository, server_args, tiled),
        over_ranks=over_ranks(sharing, mesh, server_args.torch_device()),
        shares_branches=mesh.cfg.size > 1,
    )
    return pipeline_cls(components, config, schema, server_args)


def _check_names(server_args: ServerArgs, names: Sequence[str]) -> None:
    """Refuse dtypes of components that the model does not have."""
    for component in server_args.component_dtypes:
        if component not in names:
            raise InvalidParameterError("component_dtypes", component, f"components of this model: {', '.join(names)}")


def _placed(modules: Mapping[str, Any], plan: MemoryPlan | None, memory: DeviceMemory | None) -> Residency | None:
    """Return which components lie on the device. Done last: as their weights lie now, they come and go."""
    if plan is None or memory is None:
        return None
    return offload({name: modules[name] for name in plan.placed}, plan.rooms, plan.resident_blocks, memory)


def _vae(modules: Mapping[str, Any], server_args: ServerArgs, tiled: bool, mesh: Mesh) -> VAE | None:
    """Return how the VAE is run; None where there is none."""
    if "vae" in modules:
        routes = cpu_routes(server_args.kernels, server_args.torch_device())
        ranks = mesh.world if mesh.layout.vae else None
        return run_vae(modules["vae"], in_bands=tiled, ranks=ranks, cpu_plan=routes)
    if tiled:
        raise InvalidParameterError("vae_tiling", "exact", "none with this model, which has no VAE")
    return None


def _plan_for_device(repository: Repository, server_args: ServerArgs, memory: DeviceMemory | None) -> MemoryPlan | None:
    """Return the plan for the memory that there is, and log it; None where nothing is asked of it."""
    if memory is None or (server_args.offload == "none" and server_args.memory_limit is None):
        return None
    plan = plan_memory(repository, server_args, server_args.memory_limit_bytes() or memory.free())
    for line in plan.lines():
        memory_logger.info("%s", line)
    return plan
