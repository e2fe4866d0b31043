"""What is decided before a model is loaded, from settings and JSON: what lies where, and how devices share."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from safelight.acceleration.memory import CudaMemory, DeviceMemory
from safelight.acceleration.plan import MemoryPlan, make_plan
from safelight.core.server_args import ServerArgs
from safelight.errors import InvalidParameterError
from safelight.loading.components import empty_component
from safelight.loading.description import configure, sources
from safelight.loading.footprint import measure
from safelight.loading.repository import Repository, open_for
from safelight.loading.vaes import can_divide
from safelight.parallel.apply import choose
from safelight.parallel.layout import Choice
from safelight.parallel.plans import model_facts

WITH_SEVERAL_DEVICES: Mapping[str, str] = {
    "offload": "what lies where is planned for one device's memory",
    "compile": "ranks would have the compiled form at different times",
    "cuda_graphs": "graphs do not capture what ranks send each other",
    "vae_tiling": "vae_parallel decodes in bands, one a rank",
}
"""What one device alone can have: settings of `ServerArgs` that have to be `none` otherwise, and why."""

WITH_OFFLOAD: Mapping[str, str] = {"cuda_graphs": "a graph holds the weights' addresses"}
"""What cannot be had where weights change their place."""


def refuse_excluded(server_args: ServerArgs) -> None:
    """Refuse settings that exclude each other.

    Raises:
        InvalidParameterError: naming one of them, what else is set, and why.

    """
    num_devices = server_args.num_devices()
    if num_devices > 1:
        _refuse(server_args, WITH_SEVERAL_DEVICES, f"{num_devices} devices for a request")
    elif server_args.vae_parallel:
        raise InvalidParameterError("vae_parallel", True, "false with one device: bands are decoded one a device")
    if server_args.offload != "none":
        _refuse(server_args, WITH_OFFLOAD, f"offload={server_args.offload}")


def _refuse(server_args: ServerArgs, reasons: Mapping[str, str], beside: str) -> None:
    for setting, reason in reasons.items():
        got = vars(server_args)[setting]
        if got != "none":
            raise InvalidParameterError(setting, got, f"none with {beside}: {reason}")


def layout_for(server_args: ServerArgs) -> Choice:
    """Return how the devices that the settings ask for share a request, from the model's JSON alone.

    Raises:
        InvalidParameterError: if the model cannot be divided so; with the numbers.

    """
    refuse_excluded(server_args)
    repository = open_for(server_args)
    if repository.pipeline.backend != "native":
        raise InvalidParameterError("devices", server_args.num_devices(), "1 for a model run by the diffusers package")
    pipeline_cls = repository.pipeline.pipeline_cls()
    config, schema = configure(repository)
    found = sources(repository, pipeline_cls)
    name = next((name for name in found if name.startswith("transformer")), None)
    transformer: nn.Module | None = None
    if name is not None:
        dtype = server_args.component_dtype(name, config.precisions.get(name))
        transformer = empty_component(found[name], dtype)
    divides_vae = "vae" in found and can_divide(found["vae"].target.rpartition(":")[2])
    facts = model_facts(repository.name, transformer, schema.params_cls.max_branches, divides_vae)
    device = server_args.torch_device()
    memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
    return choose(server_args, facts, memory)


def device_memory(server_args: ServerArgs) -> DeviceMemory | None:
    """Return the memory of the device that is computed on; None on the CPU, whose memory is the host's.

    Raises:
        InvalidParameterError: if there is no such device, or a setting is of a device's memory and there is none.

    """
    device = server_args.torch_device()
    if device.type == "cuda":
        return CudaMemory(device)
    own = f"on {device.type}: there is no memory but the host's, where weights are mapped files that may leave it"
    if server_args.offload != "none":
        raise InvalidParameterError("offload", server_args.offload, f"none {own}")
    if server_args.memory_limit is not None:
        raise InvalidParameterError("memory_limit", server_args.memory_limit, f"nothing {own}")
    return None


def plan_memory(
    repository: Repository, server_args: ServerArgs, limit: int, fields: Mapping[str, Any] | None = None
) -> MemoryPlan:
    """Return what of a model lies on the device at each stage, from its JSON alone: no weights are read.

    Args:
        repository: the model.
        server_args: dtypes, and which offload.
        limit: bytes of the device that may be used.
        fields: sampling parameters of the request that must fit; what is not there takes the model's defaults.

    Raises:
        InvalidParameterError: if nothing fits, or the model has no such offload.

    """
    exact = server_args.vae_tiling == "exact"
    footprint = measure(repository, server_args, fields or {}, exact or server_args.offload == "auto")
    if exact and footprint.tiled is not None:
        footprint = dataclasses.replace(footprint, stages=footprint.tiled, tiled=None)
    if server_args.offload == "none":  # otherwise it is on the host
        footprint = dataclasses.replace(footprint, kept=server_args.conditioning_cache_bytes())
    return make_plan(footprint, limit, server_args.offload)
