"""A ticket: progress to whoever follows, and one answer."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from safelight.core.params import SamplingParams
from safelight.errors import CancelledError
from safelight.runtime.client import GenerationRequest, Output, Progress, Ticket, total_timings


def ticket(n=1):
    return Ticket(GenerationRequest("r0", SamplingParams(prompt=("a", "b"), seed=0, n=n)))


def test_who_follows_sees_the_last_state_and_the_end():
    async def test():
        followed, seen = ticket(n=2), []

        async def follow():
            async for progress in followed.changes():
                seen.append(progress.step)

        following = asyncio.create_task(follow())
        await asyncio.sleep(0)
        for step in (1, 2, 3):  # at once: a slow reader skips some
            followed.advance(Progress("running", step=step))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        followed.finish([])
        await asyncio.wait_for(following, 10)
        assert seen == [0, 3] and followed.done and await followed.result() == []
        assert ticket(n=2).progress.num_outputs == 4

    asyncio.run(test())


def test_an_error_is_everybodys_and_nobody_has_to_ask():
    async def test():
        failed = ticket()
        assert failed.waits
        asked = [asyncio.create_task(failed.result()) for _ in range(2)]
        await asyncio.sleep(0)
        asked[0].cancel()
        failed.fail(CancelledError("gone"))
        with pytest.raises(CancelledError):
            await asked[1]
        assert failed.done and not failed.waits
        assert [progress async for progress in failed.changes()] == []

    asyncio.run(test())


def test_one_that_was_answered_is_not_answered_again():
    async def test():
        done = ticket()
        done.finish([])
        with pytest.raises(asyncio.InvalidStateError):
            done.fail(CancelledError("late"))

    asyncio.run(test())


@pytest.mark.parametrize(("step", "steps", "percent"), [(0, 0, 0), (0, 4, 0), (1, 3, 33), (3, 3, 99)])
def test_a_hundred_percent_are_for_who_has_the_outputs(step, steps, percent):
    assert Progress(step=step, num_inference_steps=steps).percent == percent


def test_seconds_of_a_stage_are_those_of_all_outputs():
    timings = [{"denoising": 1.0}, {"denoising": 2.0, "decoding": 0.5}]
    outputs = [Output([np.zeros((1, 1, 3), np.uint8)], 0, {}, each) for each in timings]
    assert total_timings(outputs) == {"denoising": 3.0, "decoding": 0.5}
