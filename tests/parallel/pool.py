"""A pool of ranks: processes that import torch once, and run functions of `tests.parallel.work` by name."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ANSWER_SECONDS = 240.0


class RankError(AssertionError):
    """A rank raised, or died, or did not answer in time."""


class RankPool:
    """`size` ranks of one process group."""

    def __init__(self, size: int, folder: Path) -> None:
        self.size = size
        self.folder = folder
        self.broken = False
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        self.logs = [(folder / f"rank{rank}.log").open("w+") for rank in range(size)]
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-m", "tests.parallel.rank", str(rank), str(size), str(folder / "store")],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self.logs[rank],
                env=environment,
                text=True,
            )
            for rank in range(size)
        ]

    def run(self, function: str, **arguments: Any) -> list[Any]:
        """Run a function on every rank; return what each has returned."""
        assert not self.broken, "a rank of this pool has failed before"
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.write(json.dumps([function, arguments]) + "\n")
            process.stdin.flush()
        answers = self._answers()
        failed = [f"rank {rank}: {answer['error']}" for rank, answer in enumerate(answers) if "error" in answer]
        if failed:
            self.broken = any("desynchronised" in answer for answer in answers)
            raise RankError("\n".join(failed))
        return [answer["result"] for answer in answers]

    def _answers(self) -> list[dict[str, Any]]:
        answers: dict[int, dict[str, Any]] = {}
        with selectors.DefaultSelector() as selector:
            for rank, process in enumerate(self.processes):
                assert process.stdout is not None
                selector.register(process.stdout, selectors.EVENT_READ, rank)
            end = time.monotonic() + ANSWER_SECONDS
            while len(answers) < self.size:
                ready = selector.select(max(0.0, end - time.monotonic()))
                if not ready:
                    self.broken = True
                    raise RankError(f"ranks {sorted(set(range(self.size)) - set(answers))} did not answer")
                for key, _ in ready:
                    line = key.fileobj.readline()  # type: ignore[union-attr]
                    if not line:
                        self.broken = True
                        self.logs[key.data].seek(0)
                        raise RankError(f"rank {key.data} died: {self.logs[key.data].read()[-2000:]}")
                    answers[key.data] = json.loads(line)
        return [answers[rank] for rank in range(self.size)]

    def close(self) -> None:
        """End the ranks."""
        for process in self.processes:
            assert process.stdin is not None and process.stdout is not None
            process.stdin.close()
        for process in self.processes:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(10)
            assert process.stdout is not None
            process.stdout.close()
        for log in self.logs:
            log.close()
