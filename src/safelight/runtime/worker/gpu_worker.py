"""The worker process: loads the model, and drives requests on one device until it is told to stop."""

from __future__ import annotations

import dataclasses
import gc
import logging
import os
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from safelight.acceleration.compile import missing_toolchain, warm_up_compiler
from safelight.core.device import numbered
from safelight.core.pipeline import ComposedPipeline
from safelight.core.request import Req
from safelight.core.schema import ModelSchema
from safelight.core.server_args import ServerArgs
from safelight.errors import (
    CompilationError,
    DeviceLostError,
    InvalidParameterError,
    ModelError,
    SafelightError,
    UsageError,
)
from safelight.loading.loader import load_pipeline
from safelight.loading.planning import layout_for
from safelight.parallel.mesh import Mesh, build_mesh, lone_mesh
from safelight.preparation import warm_up_params
from safelight.runtime.logs import adopt_libraries
from safelight.runtime.messages import Heartbeat, Loaded, LoadFailed, Start, schema_to_wire
from safelight.runtime.transport import WorkerChannel
from safelight.runtime.unit_board import Unit, UnitBoard
from safelight.runtime.worker.background import BackgroundCompiler
from safelight.runtime.worker.engine import Engine
from safelight.runtime.worker.forward_estimator import ForwardEstimator
from safelight.runtime.worker.memory_gauge import gauge_of
from safelight.runtime.worker.policy import Policy
from safelight.runtime.worker.ranks import Ranks
from safelight.runtime.worker.scheduler import PlanExecutor, Scheduler
from safelight.runtime.worker.stage_estimator import StageEstimator
from safelight.runtime.worker.watch import Watch

logger = logging.getLogger(__name__)

layout_logger = logging.getLogger("safelight.layout")
"""Of how devices share a request, which the commands print."""
START_SECONDS = 60.0
GROUP_LOST = 71
"""Exit code of a rank that cannot go on with the others."""
DEVICE_LOST = 72
"""Exit code of a worker whose device has failed."""
MEETING = timedelta(seconds=300)
"""For which ranks wait for each other when they start."""


class GPUWorker:
    """One device's worker.

    Args:
        channel: to the supervisor.
        board_path: of the file in which each unit is announced.

    """

    def __init__(self, channel: WorkerChannel, board_path: str) -> None:
        self.scheduler: Scheduler | PlanExecutor | None = None
        self.board = UnitBoard(Path(board_path))
        self.channel = channel
        channel.heartbeat = self._heartbeat

    def run(self) -> int:
        """Load, and serve until told to stop; return the exit code."""
        parcel = self.channel.receive(START_SECONDS)
        if parcel is None or not isinstance(parcel[0], Start):
            return 1
        start = parcel[0]
        try:
            loaded = self._load(start)
        except SafelightError as error:
            return self._give_up(str(error), error.exit_code)
        except Exception as error:  # the process's boundary: whatever it was, the supervisor is told
            logger.exception("the model cannot be loaded")
            reason = f"{type(error).__name__}: {error}"[:300]
            return self._give_up(f"the model cannot be loaded: {reason}; the log says more", 3)
        self.channel.send(loaded)
        assert self.scheduler is not None
        gc.collect()
        gc.freeze()  # the model stays: between two steps the collector need not look at all of it
        try:
            self.scheduler.run()
        except DeviceLostError:
            logger.exception("this process ends, because its device has failed")
            os._exit(DEVICE_LOST)  # what the interpreter frees at its end would ask the device again
        except Exception:
            if start.settings.num_ranks == 1:
                raise
            logger.exception("this rank cannot go on with the others")
            os._exit(GROUP_LOST)  # what waits in a collective would hold the process
        self.channel.close()
        return 0

    def _load(self, start: Start) -> Loaded:
        self.board.write(Unit("load", (), time.monotonic(), start.settings.unit_limits.first))
        begun = time.perf_counter()
        engine = build_engine(start, self.channel.path.parent, self.board if start.rank == 0 else None)
        adopt_libraries()
        load_seconds = time.perf_counter() - begun
        begun = time.perf_counter()
        is_warm = start.settings.warm_up and warm_up(engine)
        compile_in_background(engine, start.settings.unit_limits.first)
        self.board.write(None)
        self.scheduler = Scheduler(engine, self.channel) if engine.ranks.leads else PlanExecutor(engine)
        warm_up_seconds = time.perf_counter() - begun if is_warm else 0.0
        schema = with_memory(engine, start)
        return Loaded(schema_to_wire(schema), load_seconds, warm_up_seconds)

    def _give_up(self, message: str, exit_code: int) -> int:
        self.channel.send(LoadFailed(" ".join(message.split()), exit_code))
        self.channel.close()
        return exit_code

    def _heartbeat(self) -> Heartbeat:
        return self.scheduler.snapshot if isinstance(self.scheduler, Scheduler) else Heartbeat(0, {})


def build_engine(start: Start, folder: Path, board: UnitBoard | None) -> Engine:
    """Load the model, with other ranks where there are some, and return an engine on it.

    Args:
        start: what the supervisor says.
        folder: where ranks of one machine meet.
        board: where units are announced; on rank 0.

    """
    args = local_args(start)
    if args.torch_device().type == "cuda":
        torch.cuda.set_device(numbered(args.torch_device()))  # for the whole process, and everything in it
    mesh = join(start, args, folder) if start.settings.num_ranks > 1 else lone_mesh()
    pipeline = load_pipeline(args, mesh=mesh)
    batching: Any = start.settings.batching
    return Engine(
        pipeline,
        Policy(share=start.settings.share),
        max_running=start.settings.max_running,
        batching=batching,
        watch=Watch(board, start.settings.unit_limits),
        ranks=ranks_of(pipeline, mesh, args),
    )


def ranks_of(pipeline: ComposedPipeline, mesh: Mesh, args: ServerArgs) -> Ranks:
    """Return the ranks of an engine, with what knows of this one's memory, where something tells of it."""
    gauge = gauge_of(pipeline.device, args.memory_limit_bytes())
    if gauge is None:
        return Ranks(mesh.control)
    if mesh.layout.num_devices > 1:
        return Ranks(mesh.control, forward_estimator=ForwardEstimator(gauge, pipeline.components.empty))
    return Ranks(mesh.control, stage_estimator=StageEstimator(pipeline, gauge))


def with_memory(engine: Engine, start: Start) -> ModelSchema:
    """Return the schema with what a token takes, what stages do, and what all ranks have for it, in bytes."""
    pipeline = engine.pipeline
    schema = engine.ranks.schema or pipeline.schema
    if schema.architecture is None:
        return schema
    itemsize = start.settings.server_args.component_dtype("transformer").itemsize
    schema = dataclasses.replace(schema, token_bytes=schema.architecture.values_per_token * itemsize)
    if schema.device_bytes or (gauge := gauge_of(pipeline.device)) is None:
        return schema
    return dataclasses.replace(schema, device_bytes=gauge.ceiling() * start.settings.num_ranks)


def local_args(start: Start) -> ServerArgs:
    """Return the settings with this rank's own device: one after another on one machine, from the one that is named.

    Raises:
        InvalidParameterError: where there is no such device.

    """
    args = start.settings.server_args
    device = args.torch_device()
    if device.type != "cuda" or (start.settings.num_ranks == 1 and not start.settings.first_device):
        return args
    index = (device.index or 0) + start.settings.first_device + start.local_rank
    if index >= torch.cuda.device_count():
        takes = f"as many as there are: {torch.cuda.device_count()}, and a replica or rank is to have number {index}"
        raise InvalidParameterError("device", args.device, takes)
    return dataclasses.replace(args, device=f"cuda:{index}")


def join(start: Start, args: ServerArgs, folder: Path) -> Mesh:
    """Join the ranks that share every request, and return how they lie.

    Ranks on one machine meet through a file in the sockets' folder; those that `torchrun` started, as it says.
    """
    device = args.torch_device()
    backend = "nccl" if device.type == "cuda" else "gloo"
    if start.store is None:
        dist.init_process_group(backend, timeout=MEETING)
    else:
        meeting = f"file://{folder / start.store}"
        dist.init_process_group(
            backend, init_method=meeting, rank=start.rank, world_size=start.settings.num_ranks, timeout=MEETING
        )
    choice = layout_for(args)
    if start.rank == 0:
        layout_logger.info("%s", choice)
    return build_mesh(choice.layout, timedelta(seconds=start.settings.unit_limits.first))


def compile_in_background(engine: Engine, limit: float) -> None:
    """Begin to compile the model, where its settings say so, in a process of its own that may take `limit` seconds.

    What this machine or this model cannot compile is told once, and runs eagerly.
    """
    compilation = engine.runner.compilation
    if compilation is None:
        return
    missing = missing_toolchain(engine.pipeline.device.type)
    if missing is not None:
        compilation.fail(f"compiling needs {missing}")
        return
    warm_up_compiler()
    try:
        compilation.filler = BackgroundCompiler(compilation, limit)
    except CompilationError as error:
        compilation.fail(str(error))


def follow(start: Start) -> int:
    """Be a rank beside the first, where `torchrun` starts all; return when the first one stops."""
    engine = build_engine(start, Path(), None)
    adopt_libraries()
    if start.settings.warm_up:
        warm_up(engine)
    PlanExecutor(engine).run()
    return 0


def warm_up(engine: Engine) -> bool:
    """Run one small request, so that the first one of a user does not pay for what happens once; say whether it ran.

    Raises:
        ModelError: if the model fails on it.

    """
    try:
        params = warm_up_params(engine.pipeline.schema)
    except UsageError as error:
        logger.warning("no warm-up: %s", error)
        return False
    task = engine.add(Req("warm-up", params.split()[0]))
    while not task.done:
        engine.tick()
    if isinstance(task.error, UsageError):
        logger.warning("no warm-up: %s", task.error)
    elif task.error is not None:
        raise ModelError(f"the model fails on a first small request: {task.error}") from task.error
    return task.error is None
