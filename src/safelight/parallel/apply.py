"""All that several ranks do to one pipeline, in one visible order."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import nn

from safelight.core.pipeline import ComposedPipeline
from safelight.core.request import CallMaker, ModelCall, Prediction
from safelight.core.server_args import PARALLEL_SIZES, ServerArgs
from safelight.core.stage import PipelineStage
from safelight.parallel.cfg import run_calls
from safelight.parallel.collectives import Communicator, DesynchronisedError
from safelight.parallel.encoding import EncoderOnOneRank
from safelight.parallel.layout import Choice, ModelFacts, ParallelLayout, choose_layout
from safelight.parallel.mesh import Mesh
from safelight.parallel.plans import sequence_plan
from safelight.parallel.sequence import apply_sequence_parallel
from safelight.parallel.tensor import connect_shards, library_plan, shard_parameters
from safelight.parallel.vae import apply_vae_parallel
from safelight.stages.decoding import DecodingStage
from safelight.stages.text_encoding import TextEncodingStage


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


def share(pipeline: ComposedPipeline, mesh: Mesh) -> None:
    """Let a pipeline's requests be made by all ranks of a mesh; every rank calls it, and then does the same.

    Its transformers have this rank's shards already, connected.

    Args:
        pipeline: this rank's.
        mesh: as this rank sees it.

    Raises:
        InvalidParameterError: if the model cannot be divided so.

    """
    if mesh.layout.num_devices == 1:
        return
    for module in pipeline.modules().values():
        if sequence_plan(module) is not None:
            apply_sequence_parallel(module, mesh)
    shared = {name for name, stage in pipeline.stages.items() if share_encoders(stage, mesh, pipeline)}
    if mesh.layout.vae:
        apply_vae_parallel(pipeline, mesh.world)
        shared |= {name for name, stage in pipeline.stages.items() if isinstance(stage, DecodingStage)}
    pipeline.shared_stages = frozenset(shared)
    pipeline.run_calls = partial(run_shared, mesh.cfg)
    pipeline.shares_branches = mesh.cfg.size > 1


def waits_on_host(name: str, mesh: Mesh) -> bool:
    """Say whether a component stays on this rank's host until `share` has seen whether the rank needs it."""
    return name.startswith("text_encoder") and mesh.world.rank > 0


def share_encoders(stage: PipelineStage, mesh: Mesh, pipeline: ComposedPipeline) -> bool:
    """Divide the weights of a stage's text encoders, or let one rank run them; False if every rank runs its own."""
    shared = False
    for part in (stage, *stage.parts()):
        if isinstance(part, TextEncodingStage):
            found = [_shared_encoder(encoder, mesh, pipeline) for encoder in part.text_encoders]
            shared |= any(is_shared for _, is_shared in found)
            part.text_encoders = [encoder for encoder, _ in found]
    return shared


def _shared_encoder(encoder: nn.Module, mesh: Mesh, pipeline: ComposedPipeline) -> tuple[Any, bool]:
    """Return what stands for an encoder, and whether ranks wait for each other in it.

    It has this rank's shards, or is one rank's. An encoder that is a part of a component is needed by others too, and
    stays on every rank.
    """
    owner = next(module for module in pipeline.modules().values() if encoder in set(module.modules()))
    plan = library_plan(encoder, mesh.tp.size) if mesh.tp.size > 1 else None
    if plan is None and owner is encoder:
        own = encoder if mesh.world.rank == 0 else None
        return EncoderOnOneRank(own, mesh.world, pipeline.device), True
    if plan is not None:
        shard_parameters(encoder, mesh.tp.rank, mesh.tp.size, plan)
        connect_shards(encoder, mesh.tp, plan)
    owner.to(pipeline.device)
    return encoder, plan is not None


def run_shared(ranks: Communicator, calls: Sequence[ModelCall], make: CallMaker) -> list[Prediction]:
    """Make the calls of a step over all ranks.

    Raises:
        DesynchronisedError: if that fails here, where others wait.

    """
    try:
        return run_calls(calls, make, ranks)
    except Exception as error:
        raise DesynchronisedError("a forward that several ranks share failed on one") from error
