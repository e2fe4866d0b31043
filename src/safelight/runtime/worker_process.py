"""The first lines of a worker's process: the supervisor hears of it before anything is imported that may fail.

What they import themselves the supervisor's own process has imported already.
"""

from __future__ import annotations

import logging
import signal
import sys
from importlib import import_module

from safelight.runtime.logs import configure
from safelight.runtime.messages import LoadFailed
from safelight.runtime.transport import WorkerChannel

logger = logging.getLogger(__name__)

FAILED = 3
"""Exit code of a process that cannot begin, as of one that cannot load its model."""


def main() -> None:
    """Run a worker: the arguments are the socket, the board and the supervisor's process id."""
    configure(logging.WARNING, "%(asctime)s worker %(levelname)s %(name)s: %(message)s")
    for name in ("safelight.memory", "safelight.layout"):  # of what was planned, because it was asked for
        logging.getLogger(name).setLevel(logging.INFO)
    for number in (signal.SIGINT, signal.SIGTERM):  # of a terminal, or for a whole group: the supervisor decides
        signal.signal(number, signal.SIG_IGN)
    channel_path, board_path, parent = sys.argv[1:]
    sys.exit(run(WorkerChannel(channel_path, int(parent)), board_path))


def run(channel: WorkerChannel, board_path: str) -> int:
    """Import the worker, and let it serve; return the exit code. What keeps it from beginning is told."""
    try:
        worker = import_module("safelight.runtime.worker").GPUWorker(channel, board_path)
    except Exception as error:  # the process's boundary: whatever it was, the supervisor is told
        logger.exception("the worker cannot begin")
        reason = f"the worker's process cannot begin: {type(error).__name__}: {error}"
        channel.send(LoadFailed(" ".join(reason.split())[:500], FAILED))
        channel.close()
        return FAILED
    return int(worker.run())


if __name__ == "__main__":
    main()
