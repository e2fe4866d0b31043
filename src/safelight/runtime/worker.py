"""The worker process: loads the model, and drives requests on one device until it is told to stop."""

from __future__ import annotations

import logging
import signal
import sys
import time
from pathlib import Path
from typing import Any

from safelight.acceleration.background import BackgroundCompiler
from safelight.acceleration.compile import missing_toolchain, warm_up_compiler
from safelight.core.request import Req
from safelight.errors import CompilationError, ModelError, SafelightError, UsageError
from safelight.loading.loader import load_pipeline
from safelight.preparation import warm_up_params
from safelight.runtime.engine import Engine
from safelight.runtime.messages import Heartbeat, Loaded, LoadFailed, Start, schema_to_wire
from safelight.runtime.policy import Policy
from safelight.runtime.scheduler import Scheduler
from safelight.runtime.transport import WorkerChannel
from safelight.runtime.watch import Unit, UnitBoard, Watch

logger = logging.getLogger(__name__)

START_SECONDS = 60.0


class GPUWorker:
    """One device's worker.

    Args:
        channel_path: of the supervisor's socket.
        board_path: of the file in which each unit is announced.
        parent: process id of the supervisor.

    """

    def __init__(self, channel_path: str, board_path: str, parent: int) -> None:
        self.scheduler: Scheduler | None = None
        self.board = UnitBoard(Path(board_path))
        self.channel = WorkerChannel(channel_path, parent, self._heartbeat)

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
            return self._give_up(f"the model cannot be loaded: {type(error).__name__}; the log says more", 3)
        self.channel.send(loaded)
        assert self.scheduler is not None
        self.scheduler.run()
        self.channel.close()
        return 0

    def _load(self, start: Start) -> Loaded:
        self.board.write(Unit("load", (), time.monotonic(), start.limits.first))
        begun = time.perf_counter()
        pipeline = load_pipeline(start.args())
        load_seconds = time.perf_counter() - begun
        watch = Watch(self.board, start.limits)
        batching: Any = start.batching
        policy = Policy(share=start.share)
        engine = Engine(pipeline, policy, max_running=start.max_running, batching=batching, watch=watch)
        begun = time.perf_counter()
        if start.warm_up:
            warm_up(engine)
        compile_in_background(engine, start.limits.first)
        self.board.write(None)
        self.scheduler = Scheduler(engine, self.channel)
        warm_up_seconds = time.perf_counter() - begun if start.warm_up else 0.0
        return Loaded(schema_to_wire(pipeline.schema), load_seconds, warm_up_seconds)

    def _give_up(self, message: str, exit_code: int) -> int:
        self.channel.send(LoadFailed(" ".join(message.split()), exit_code))
        self.channel.close()
        return exit_code

    def _heartbeat(self) -> Heartbeat:
        return self.scheduler.snapshot if self.scheduler is not None else Heartbeat(0, 0, 0, {})


def compile_in_background(engine: Engine, limit: float) -> None:
    """Begin to compile the model, where its settings say so, in a process of its own that may take `limit` seconds.

    What this machine or this model cannot compile is told once, and runs eagerly.
    """
    compilation = engine.callers.compilation
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


def warm_up(engine: Engine) -> None:
    """Run one small request, so that the first one of a user does not pay for what happens once.

    Raises:
        ModelError: if the model fails on it.

    """
    try:
        params = warm_up_params(engine.pipeline.schema)
    except UsageError as error:
        logger.warning("no warm-up: %s", error)
        return
    task = engine.add(Req("warm-up", params.split()[0]))
    while not task.done:
        engine.tick()
    if isinstance(task.error, UsageError):
        logger.warning("no warm-up: %s", task.error)
    elif task.error is not None:
        raise ModelError(f"the model fails on a first small request: {task.error}") from task.error


def main() -> None:
    """Run a worker: the arguments are the socket, the board and the supervisor's process id."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s worker %(levelname)s %(name)s: %(message)s")
    logging.getLogger("safelight.memory").setLevel(logging.INFO)  # of a plan that was asked for
    for number in (signal.SIGINT, signal.SIGTERM):  # of a terminal, or for a whole group: the supervisor decides
        signal.signal(number, signal.SIG_IGN)
    channel_path, board_path, parent = sys.argv[1:]
    sys.exit(GPUWorker(channel_path, board_path, int(parent)).run())


if __name__ == "__main__":
    main()
