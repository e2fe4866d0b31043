"""What bounds jobs, what is told of them, and an unfinished job in this process. Imports no torch."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Literal

from safelight.runtime.client import Progress, Ticket
from safelight.serving.jobs import Job


@dataclass(frozen=True)
class JobLimits:
    """What bounds jobs.

    Attributes:
        max_unfinished: jobs that wait or run; more are refused.
        max_submitted: of these, how many the engine is given; the others leave its queue to who waits for an answer.
        max_taken: jobs of an earlier server that are in memory at a time; the others wait in the store.
        max_submitted_bytes: of the input files of these, unless it is one job alone; the others' stay on the disk.
        keep_seconds: how long a finished job and its files are kept.
        max_bytes: of all jobs' files and records; the first finished are removed for later ones. None is no limit.
        max_record_bytes: of all jobs' records; beyond, failed jobs are removed, and then completed ones.
        sweep_seconds: between two searches for what has expired.
        retry_seconds: after which a full or unready engine, a full disk, or a held database is tried again.
        busy_seconds: for which whoever waits for an answer waits for a held database.

    """

    max_unfinished: int = 1000
    max_submitted: int = 16
    max_taken: int = 64
    max_submitted_bytes: int = 64 << 20
    keep_seconds: float = 24 * 3600.0
    max_bytes: int | None = None
    max_record_bytes: int = 64 << 20
    sweep_seconds: float = 60.0
    retry_seconds: float = 0.25
    busy_seconds: float = 5.0


@dataclass(frozen=True)
class JobEvent:
    """What became of a job: it waits (or has moved up), began (anew, after a death), made a step, or ended."""

    type: Literal["queued", "started", "step", "completed", "failed"]
    job: Job
    progress: Progress


class Run:
    """An unfinished job in this process, and whose it is; nobody's, after a restart.

    Attributes:
        is_new: whether this server accepted it, so that the jobs of an earlier one come before it.
        over: whether nothing more becomes of it in this process.

    """

    def __init__(self, job: Job, client: str = "", is_new: bool = False) -> None:
        self.job, self.client, self.is_new = job, client, is_new
        self.ticket: Ticket | None = None
        self.task: asyncio.Task[None] | None = None
        self.over = False
        self.changed = asyncio.Event()

    @property
    def running(self) -> bool:
        """Whether the engine works on it, or its outputs are being written."""
        return self.ticket is not None and (self.ticket.done or self.ticket.progress.state == "running")

    def wake(self) -> None:
        """Tell whoever follows it that something is new."""
        changed, self.changed = self.changed, asyncio.Event()
        changed.set()
