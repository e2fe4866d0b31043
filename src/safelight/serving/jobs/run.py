"""An unfinished job in this process, and what is told of it. Imports no torch."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Literal

from safelight.runtime.client import Progress, Ticket
from safelight.serving.jobs.job import Job


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
        is_lost: whether it may be another server's by now: this one stops it, and has no say in it any more.

    """

    def __init__(self, job: Job, client: str = "", is_new: bool = False) -> None:
        self.job, self.client, self.is_new = job, client, is_new
        self.ticket: Ticket | None = None
        self.task: asyncio.Task[None] | None = None
        self.is_lost = False
        self.changed = asyncio.Event()

    @property
    def running(self) -> bool:
        """Whether the engine works on it, or its outputs are being written."""
        return self.ticket is not None and (self.ticket.done or self.ticket.progress.state == "running")

    def show(self, job: Job) -> None:
        """Tell whoever follows it what the job is now; a finished one stays as it is."""
        if not self.job.finished:
            self.job = job
            self.wake()

    def wake(self) -> None:
        """Tell whoever follows it that something is new."""
        changed, self.changed = self.changed, asyncio.Event()
        changed.set()
