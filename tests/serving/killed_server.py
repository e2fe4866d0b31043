"""A server of jobs that is there to be killed: `python -m tests.serving.killed_server STATE LOG`.

Every line on its standard input starts one, in a forked process whose id is printed; when that is dead, so is said. A
server appends to LOG what it has acknowledged, one line at a time: `accepted ID`, `completed ID TIME`, `deleting ID`,
`deleted ID`, `keyed KEY ID`.
"""

from __future__ import annotations

import asyncio
import os
import random
import sys
import time
from pathlib import Path

from safelight.preparation import prepare
from safelight.serving.admission import Admission
from safelight.serving.jobs.folder import FolderFiles
from safelight.serving.jobs.inputs import new_job
from safelight.serving.jobs.job import Job, request_digest
from safelight.serving.jobs.limits import JobLimits
from safelight.serving.jobs.manager import JobManager
from safelight.serving.jobs.sqlite import SqliteJobStore
from tests.serving.stub_engine import IMAGE_SCHEMA, StubEngine

ENDINGS = ("", "", "", "", " [die:1]", " [die]", " [fail:out_of_memory@1]")


class TellingStore(SqliteJobStore):
    """A store that says what it has completed."""

    log: int

    async def replace(self, old: Job, new: Job) -> bool:
        done = await super().replace(old, new)
        if done and new.state == "completed":
            os.write(self.log, f"completed {new.id} {new.completed_at}\n".encode())
        return done


def make_manager(state: Path, log: int) -> JobManager:
    store = TellingStore(state)
    store.log = log
    engine = StubEngine(step_seconds=0.001, max_waiting=4, max_running=2)
    return JobManager(store, FolderFiles(state / "outputs"), engine, limits=JobLimits(retry_seconds=0.01))


async def serve(state: Path, log: int) -> None:
    """Accept and run jobs, delete some, until death."""
    manager = make_manager(state, log)
    await manager.start()
    accepted = []
    for number in range(10_000):
        prompt = f"{os.getpid()}/{number}{random.choice(ENDINGS)}"
        params, _ = prepare(IMAGE_SCHEMA, {"prompt": prompt, "n": random.choice((1, 2))})
        key = f"{os.getpid()}/{number // 2}" if number % 5 < 2 else None  # two jobs with one key, now and then
        job = await manager.acceptance.submit(
            *new_job(params, IMAGE_SCHEMA, {}, idempotency_key=key, digest=request_digest({})), Admission()
        )
        os.write(log, f"keyed {key} {job.id}\n".encode() if key else f"accepted {job.id}\n".encode())
        accepted.append(job.id)
        if random.random() < 0.1:
            job_id = accepted.pop(random.randrange(len(accepted)))
            os.write(log, f"deleting {job_id}\n".encode())
            await manager.delete(job_id)
            os.write(log, f"deleted {job_id}\n".encode())
        await asyncio.sleep(random.random() * 0.02)


def main(state: Path, log: Path) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for _ in sys.stdin:
        child = os.fork()
        if child == 0:
            random.seed(time.time_ns())
            asyncio.run(serve(state, descriptor))
        print(child, flush=True)
        os.waitpid(child, 0)
        print("dead", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
