"""What is told of a job in this process."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from safelight.preparation import prepare
from safelight.runtime.client import GenerationRequest, Progress, Ticket
from safelight.serving.jobs.job import Job, JobError
from safelight.serving.jobs.run import Run
from tests.serving.stub_engine import IMAGE_SCHEMA

JOB = Job(id="image_1", kind="image", model="m", params={}, created_at=1.0)


def test_whoever_follows_is_woken_once_by_each_change():
    run = Run(JOB)
    first = run.changed
    run.show(JOB.begun(2.0))
    assert first.is_set() and not run.changed.is_set() and run.job.attempts == 1


def test_what_has_ended_stays_as_it_is():
    run = Run(JOB)
    run.show(JOB.failed(JobError("cancelled", "c")))
    changed = run.changed
    run.show(JOB.begun(2.0))
    assert run.job.state == "failed" and run.changed is changed and not changed.is_set()


@pytest.mark.parametrize("state", ["none", "queued", "running", "done"])
def test_it_runs_from_its_first_step_until_its_outputs_are_written(state):
    async def use() -> bool:
        run = Run(JOB)
        if state != "none":
            run.ticket = Ticket(GenerationRequest("r", prepare(IMAGE_SCHEMA, {"prompt": "a"})[0]))
        progress: dict[str, Any] = {"queued": Progress("queued"), "running": Progress("running", step=1)}
        if run.ticket is not None and state in progress:
            run.ticket.advance(progress[state])
        elif run.ticket is not None:
            run.ticket.finish([])
        return run.running

    assert asyncio.run(use()) == (state in ("running", "done"))
