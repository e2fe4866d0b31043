"""Requests through a pipeline with features on, and what was seen of each feature meanwhile."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from safelight import ServerArgs
from safelight.acceleration.plan import WORKSPACE, plan_mode
from safelight.core.executor import SyncExecutor
from safelight.core.form import Form
from safelight.core.pipeline import ComposedPipeline
from safelight.core.request import Req
from safelight.loading.footprint import measure
from safelight.loading.loader import load_pipeline
from safelight.loading.planning import layout_for
from safelight.loading.repository import open_repository
from safelight.parallel.layout import ParallelLayout
from safelight.parallel.mesh import Mesh, build_mesh
from safelight.runtime.worker.engine import Batching, Engine
from safelight.runtime.worker.model_runner import PipelineRunner
from safelight.runtime.worker.plan import Plan
from safelight.runtime.worker.policy import Task
from safelight.runtime.worker.ranks import Ranks
from safelight.testing.models import requests
from tests.acceleration.memories import LateMemory
from tests.features.table import FEATURE, OFF, Driver, Pair
from tests.parallel import checkpoints
from tests.recipes import all_recipes
from tests.recipes.flux import CAT, MAP

NUM_LAYERS = 3
"""Of each kind of block: more than there are slots, so that blocks stream."""
TIMEOUT = timedelta(seconds=60)
GUIDED = {"negative_prompt": "blurry, low quality", "true_cfg_scale": 3.0}
COMMON = {"num_inference_steps": 3, "output_type": "np"}
ASKED: Mapping[str, Sequence[Mapping[str, Any]]] = {
    "FluxPipeline": (
        {"prompt": CAT, "height": 48, "width": 64, "seed": 1, "n": 2, **GUIDED, "max_sequence_length": 24},
        {"prompt": MAP, "height": 36, "width": 44, "seed": 3, **GUIDED, "max_sequence_length": 32},
    ),
    "QwenImagePipeline": (
        {"prompt": CAT, "height": 48, "width": 64, "seed": 1, "n": 2, **GUIDED},
        {"prompt": MAP, "height": 80, "width": 32, "seed": 3, **GUIDED},
    ),
    "WanPipeline": (
        {"prompt": CAT, "height": 48, "width": 64, "num_frames": 5, "seed": 1, "n": 2, "max_sequence_length": 24},
        {"prompt": MAP, "height": 80, "width": 32, "num_frames": 5, "seed": 3, "max_sequence_length": 32},
    ),
}
"""Of each family two requests with guidance: one of two outputs, which can share forwards and embeddings; the other has
another size and text, and its tokens do not divide."""


@dataclass
class Seen:
    """What happened in a run.

    Attributes:
        outputs: pixels in [0, 1] of each output.
        stacked: the most requests that one tick resumed together in the engine.
        switches: how often the engine went from one request that was not over to another.
        compiled: whether every request ran in the compiled form.
        brought: the components that were brought to the device.
        sent: the axes over which this rank has sent something.

    """

    outputs: list[Tensor] = field(default_factory=list)
    stacked: int = 0
    switches: int = 0
    compiled: bool = False
    brought: set[str] = field(default_factory=set)
    sent: set[str] = field(default_factory=set)


def build(name: str, folder: Path) -> Path:
    """Write a pipeline's tiny checkpoint, which divides by two and whose blocks stream."""
    checkpoints.build(all_recipes()[name], "default", folder, num_layers=NUM_LAYERS)
    sizes = {
        size: max(fields[size] for fields in ASKED[name])
        for size in ("height", "width", "num_frames")
        if size in ASKED[name][0]
    }
    (folder / "generation_config.json").write_text(json.dumps(sizes))  # for which memory is planned
    return folder


def load(folder: Path, pair: Pair | None, mesh: Mesh | None = None) -> ComposedPipeline:
    """Load a model with a pair's features on, or with everything off."""
    settings = dict(OFF) if pair is None else pair.settings
    device = "cuda" if pair is not None and pair.needs_cuda else "cpu"
    memory = None
    if pair is not None and pair.needs_memory and device == "cpu":
        memory = LateMemory()
        settings["memory_limit"] = least_limit(folder, settings["offload"])
    return load_pipeline(ServerArgs(str(folder), device=device, dtype="float32", **settings), memory, mesh)


@cache
def least_limit(folder: Path, mode: str) -> int:
    """Return the smallest limit under which an offload fits."""
    footprint = measure(open_repository(folder), ServerArgs(str(folder), dtype="float32"), {})
    return plan_mode(footprint, 0, mode, False).peak + WORKSPACE


def asked(pipeline: ComposedPipeline, name: str) -> list[Req]:
    """Return the requests."""
    made = [requests(pipeline, {**COMMON, **fields}) for fields in ASKED[name]]
    for index, outputs in enumerate(made):
        for req in outputs:
            req.request_id = f"r{index}"
    return [req for outputs in made for req in outputs]


def run(pipeline: ComposedPipeline, name: str, driver: Driver, mesh: Mesh | None = None) -> Seen:
    """Run the requests of a family."""
    seen, reqs = Seen(), asked(pipeline, name)
    watch_components(pipeline, seen)
    if driver == "alone":
        runner = PipelineRunner(pipeline)
        runner.finish_compiling()
        seen.compiled = runner.form.mode == "compiled"
        for req in reqs:
            for _ in SyncExecutor(pipeline, runner, runner.form).execute(req):
                pass
    else:
        batching: Batching = "throughput" if driver == "stacked" else "exact"
        ranks = None if mesh is None else Ranks(mesh.control)
        engine = Engine(pipeline, clock=ticking(), batching=batching, ranks=ranks)
        engine.runner.finish_compiling()
        tasks = [engine.add(req) for req in reqs]
        drive(engine, seen)
        for task in tasks:
            if task.error is not None:
                raise task.error
        seen.compiled = all(task.form == Form("compiled") for task in tasks)
    seen.outputs = [req.outputs[0] for req in reqs]
    if mesh is not None:
        seen.sent = {axis for axis, traffic in mesh.traffic().items() if traffic.num_calls}
    return seen


def ticking() -> Any:
    """Return a clock that goes on a second with each look: requests take turns."""
    times = iter(range(10**9))
    return lambda: float(next(times))


def drive(engine: Engine, seen: Seen) -> None:
    """Tick until all is done; rank 0 plans."""
    before: Task | None = None
    while engine.tasks:
        plan = planned(engine)
        if before is not None and not before.done and before not in plan.resumed:
            seen.switches += 1
        seen.stacked = max(seen.stacked, len(plan.resumed))
        engine.carry_out(plan)
        before = plan.resumed[0]


def planned(engine: Engine) -> Plan:
    """Return what the next tick does, on every rank."""
    if engine.ranks.leads:
        plan = engine.plan()
        engine.ranks.lead(plan)
        return plan
    order = engine.ranks.follow()
    assert order is not None
    return order.plan(engine.tasks)


def watch_components(pipeline: ComposedPipeline, seen: Seen) -> None:
    """Note which components are brought to the device."""
    bring, placed = pipeline.residency.bring, pipeline.residency._placements

    def noting(names: Any) -> None:
        names = list(names)
        seen.brought |= set(names) & set(placed)
        bring(names)

    pipeline.residency.bring = noting  # type: ignore[method-assign]


def not_in_effect(pair: Pair, pipeline: ComposedPipeline, seen: Seen) -> list[str]:
    """Return the features of a pair of which nothing was seen: a setting that does nothing gives equal pixels too."""
    vae = type(pipeline.vae.decoder).__name__ if pipeline.vae is not None else ""
    over_ranks: Any = pipeline.components.over_ranks
    offloaded = seen.brought == set(pipeline.modules())
    effects = {
        "interleaving": seen.switches > 0,
        "throughput batching": seen.stacked > 1,
        "conditioning cache": pipeline.conditioning_cache.num_hits > 0,
        "kernels": True,  # what they replace depends on the processor
        "exact tiles": vae.endswith("BandDecoder"),
        "offload, components": offloaded,
        "offload, blocks": offloaded,
        "compile": seen.compiled,
        "CUDA graphs": True,  # whether a shape has one depends on a measurement
        "tensor parallel": "tp" in seen.sent,
        "Ulysses": "ulysses" in seen.sent,
        "ring": "ring" in seen.sent,
        "CFG parallel": "cfg" in seen.sent,
        "VAE parallel": over_ranks is not None and "world" in seen.sent and "vae" in over_ranks.sharing,
    }
    return sorted(name for name in pair.names if not effects[name])


def largest_difference(made: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """Return the largest difference of two runs' pixels."""
    assert [each.shape for each in made] == [each.shape for each in wanted]
    return max(float((one - other).abs().max()) for one, other in zip(made, wanted, strict=True))


def pair_on_ranks(folder: str, name: str, one: str, other: str, out: str) -> list[str]:
    """On each rank of a pool: write the outputs of a pair; return which of its features were not in effect."""
    pair = Pair(FEATURE[one], FEATURE[other])
    args = ServerArgs(folder, device="cpu", dtype="float32", **pair.settings)
    mesh = mesh_of(layout_for(args).layout)
    for communicator in (mesh.cfg, mesh.ring, mesh.ulysses, mesh.tp, mesh.world):
        communicator.traffic.num_calls = 0
    pipeline = load(Path(folder), pair, mesh)
    seen = run(pipeline, name, pair.driver, mesh)
    outputs = {f"r{index}": output.contiguous() for index, output in enumerate(seen.outputs)}
    save_file(outputs, str(Path(out) / f"rank{mesh.world.rank}.safetensors"))
    return not_in_effect(pair, pipeline, seen)


@cache
def mesh_of(layout: ParallelLayout) -> Mesh:
    """Return the mesh of a layout over all ranks of the pool."""
    return build_mesh(layout, TIMEOUT)
