"""Whoever follows a job is told all that becomes of it, in order."""

from __future__ import annotations

import asyncio

from tests.serving.job_server import collect, serving
from tests.serving.stub_engine import StubEngine


def test_events_tell_the_whole_way_in_order(tmp_path):
    async def use(server):
        first, second = await server.submit("a [hold]"), await server.submit("b", num_inference_steps=30)
        seen = asyncio.create_task(collect(server.jobs.events.follow(second.id)))
        await server.until_step(first, 3)
        server.engine.release()
        events = await seen
        types = [event.type for event in events]
        assert types[0] == "queued" and types[-1] == "completed" and types.count("started") == 1
        assert types == sorted(types, key=["queued", "started", "step", "completed"].index)
        assert next(e.progress.queue_position for e in events if e.type == "queued") in (0, 1)
        steps = [event.progress.step for event in events if event.type == "step"]
        assert steps and steps == sorted(set(steps))
        assert [event.job.state for event in events if event.type == "step"] == ["in_progress"] * len(steps)
        assert events[-1].job == await server.get(second.id)
        assert [event.type for event in await collect(server.jobs.events.follow(second.id))] == ["completed"]
        assert await collect(server.jobs.events.follow("image_none")) == []
        assert server.jobs.events.progress(second.id) is None

    serving(tmp_path, use, StubEngine(step_seconds=0.005))
