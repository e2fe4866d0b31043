"""A pool of ranks: one process imports torch once and forks them; they run functions of `work` by name."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, TextIO

ANSWER_SECONDS = 240.0


class RankError(AssertionError):
    """A rank raised, or died, or did not answer in time."""


class RankPool:
    """`size` ranks of one process group."""

    def __init__(self, size: int, folder: Path) -> None:
        self.size = size
        self.broken = False
        self.log = (folder / "log").open("w+")
        requests, answers = [os.pipe() for _ in range(size)], [os.pipe() for _ in range(size)]
        theirs = [fd for pair in zip(requests, answers, strict=True) for fd in (pair[0][0], pair[1][1])]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        command = [sys.executable, "-W", "ignore", "-m", "tests.parallel.rank", str(folder / "store")]
        self.process = subprocess.Popen(
            [*command, *map(str, theirs)], stdout=self.log, stderr=self.log, env=environment, pass_fds=theirs
        )
        for fd in theirs:
            os.close(fd)
        self.requests: list[TextIO] = [os.fdopen(writing, "w") for _, writing in requests]
        self.answers: list[TextIO] = [os.fdopen(reading) for reading, _ in answers]

    def run(self, function: str, **arguments: Any) -> list[Any]:
        """Run a function on every rank; return what each has returned."""
        assert not self.broken, "a rank of this pool has failed before"
        for pipe in self.requests:
            pipe.write(json.dumps([function, arguments]) + "\n")
            pipe.flush()
        answers = self._answers()
        failed = [f"rank {rank}: {answer['error']}" for rank, answer in enumerate(answers) if "error" in answer]
        if failed:
            self.broken = True
            raise RankError("\n".join(failed))
        return [answer["result"] for answer in answers]

    def _answers(self) -> list[dict[str, Any]]:
        answers: dict[int, dict[str, Any]] = {}
        with selectors.DefaultSelector() as selector:
            for rank, pipe in enumerate(self.answers):
                selector.register(pipe, selectors.EVENT_READ, rank)
            end = time.monotonic() + ANSWER_SECONDS
            while len(answers) < self.size:
                ready = selector.select(max(0.0, end - time.monotonic()))
                if not ready:
                    self._fail(f"ranks {sorted(set(range(self.size)) - set(answers))} did not answer")
                for key, _ in ready:
                    line = self.answers[key.data].readline()
                    if not line:
                        self._fail(f"rank {key.data} died")
                    answers[key.data] = json.loads(line)
        return [answers[rank] for rank in range(self.size)]

    def _fail(self, message: str) -> None:
        self.broken = True
        self.log.seek(0)
        raise RankError(f"{message}; the log ends with: {self.log.read()[-2000:]}")

    def close(self) -> None:
        """End the ranks."""
        for pipe in self.requests:
            pipe.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()  # its ranks end when their requests do, or with their collective's timeout
            self.process.wait(10)
        for pipe in (*self.answers, self.log):
            pipe.close()
