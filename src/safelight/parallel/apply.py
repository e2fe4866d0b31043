"""All that several ranks do to one model, in one visible order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from safelight.core.server_args import PARALLEL_SIZES, ServerArgs
from safelight.parallel.calls import CallsOverRanks, Sharing
from safelight.parallel.layout import Choice, ModelFacts, ParallelLayout, choose_layout
from safelight.parallel.mesh import Mesh
from safelight.parallel.plans import sequence_plan
from safelight.parallel.sequence import apply_sequence_parallel
from safelight.parallel.tensor import connect_shards, library_plan, shard_parameters


def choose(server_args: ServerArgs, facts: ModelFacts, device_bytes: int | None = None) -> Choice:
    """Return the layout that the settings ask for, or the planner's where they give a number of devices alone.

    Args:
        server_args: the settings.
        facts: of the model.
        device_bytes: memory of one device; None is no bound.

    Raises:
        InvalidParameterError: if the model cannot have it; with the numbers.

    """
    sizes = [vars(server_args)[name] for name in PARALLEL_SIZES]
    if max(sizes) > 1 or server_args.num_devices() == 1:
        cfg, ring, ulysses, tp = sizes
        layout = ParallelLayout(cfg, ring, ulysses, tp, server_args.vae_parallel)
        layout.check(facts)
        return Choice(layout, ())
    return choose_layout(server_args.num_devices(), facts, device_bytes=device_bytes)


def share(modules: Mapping[str, Any], mesh: Mesh, device: torch.device) -> dict[str, Sharing]:
    """Let components be run by all ranks of a mesh together; every rank calls it, and then does the same.

    The transformers have this rank's shards already, connected.

    Args:
        modules: this rank's components, by name; changed in place.
        mesh: as this rank sees it.
        device: this rank's.

    Returns:
        how ranks share the calls of each component that they share, steps aside.

    Raises:
        InvalidParameterError: if the model cannot be divided so.

    """
    sharing: dict[str, Sharing] = {}
    if mesh.layout.num_devices == 1:
        return sharing
    for name, module in modules.items():
        if isinstance(module, nn.Module) and sequence_plan(module) is not None:
            apply_sequence_parallel(module, mesh)
        elif name.startswith("text_encoder"):
            sharing[name] = share_encoder(module, mesh, device)
        elif name == "vae" and mesh.layout.vae:
            sharing[name] = "together"
    return sharing


def waits_on_host(name: str, mesh: Mesh) -> bool:
    """Say whether a component stays on this rank's host until `share` has seen whether the rank needs it."""
    return name.startswith("text_encoder") and mesh.world.rank > 0


def share_encoder(encoder: nn.Module, mesh: Mesh, device: torch.device) -> Sharing:
    """Divide the weights of a text encoder among the ranks, or leave it to the first."""
    plan = library_plan(encoder, mesh.tp.size) if mesh.tp.size > 1 else None
    if plan is None:
        return "first rank"
    shard_parameters(encoder, mesh.tp.rank, mesh.tp.size, plan)
    connect_shards(encoder, mesh.tp, plan)
    encoder.to(device)
    return "together"


def over_ranks(sharing: Mapping[str, Sharing], mesh: Mesh, device: torch.device) -> CallsOverRanks | None:
    """Return what has the ranks of a mesh make calls together; None for one rank."""
    return CallsOverRanks(sharing, mesh.cfg, mesh.world, device) if mesh.layout.num_devices > 1 else None
