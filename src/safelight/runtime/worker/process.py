"""The first lines of a worker's process: the supervisor hears of it before anything is imported that may fail.

What they import themselves the supervisor's own process has imported already.
"""

from __future__ import annotations

import logging
import signal
import sys
from contextlib import suppress
from importlib import import_module
from pathlib import Path

from safelight.runtime.logs import configure
from safelight.runtime.messages import LoadFailed
from safelight.runtime.processes import uncollected
from safelight.runtime.transport import WorkerChannel

logger = logging.getLogger(__name__)

FAILED = 3
"""Exit code of a process that cannot begin, as of one that cannot load its model."""

OOM_SCORE = Path("/proc/self/oom_score_adj")
OOM_SCORE_STEP, MOST_OOM_SCORE = 500, 1000
"""By which a worker is put forward: as if it took half of all memory more; the kernel takes a thousand at most."""


def main() -> None:
    """Run a worker: the arguments are the socket, the board and the supervisor's process id."""
    configure(logging.WARNING, "%(asctime)s worker %(levelname)s %(name)s: %(message)s")
    for name in ("safelight.memory", "safelight.layout"):  # of what was planned, because it was asked for
        logging.getLogger(name).setLevel(logging.INFO)
    for number in (signal.SIGINT, signal.SIGTERM):  # of a terminal, or for a whole group: the supervisor decides
        signal.signal(number, signal.SIG_IGN)
    give_way()
    channel_path, board_path, parent = sys.argv[1:]
    sys.exit(run(WorkerChannel(channel_path, int(parent)), board_path))


def give_way() -> None:
    """Have the kernel, where memory runs out, end this process and what it starts before the one that supervises it.

    A process may always put itself further forward; where the system has no such list, or one to read, it stays.
    """
    with suppress(OSError):
        OOM_SCORE.write_text(str(min(MOST_OOM_SCORE, int(OOM_SCORE.read_text()) + OOM_SCORE_STEP)))


def run(channel: WorkerChannel, board_path: str) -> int:
    """Import the worker, and let it serve; return the exit code. What keeps it from beginning is told."""
    try:
        with uncollected():
            worker = import_module("safelight.runtime.worker.gpu_worker").GPUWorker(channel, board_path)
    except Exception as error:  # the process's boundary: whatever it was, the supervisor is told
        logger.exception("the worker cannot begin")
        reason = f"the worker's process cannot begin: {type(error).__name__}: {error}"
        channel.send(LoadFailed(" ".join(reason.split())[:500], FAILED))
        channel.close()
        return FAILED
    return int(worker.run())


if __name__ == "__main__":
    main()
