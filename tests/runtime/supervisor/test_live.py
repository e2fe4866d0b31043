"""A request without an answer: how far its outputs are together, and what a new worker is told of it."""

from __future__ import annotations

import asyncio
import time

import pytest

from safelight.core.form import Form
from safelight.core.params import SamplingParams
from safelight.runtime.client import GenerationRequest, Output, Ticket
from safelight.runtime.messages import Progressed
from safelight.runtime.supervisor.live import LiveRequest

COMPILED = Form("compiled")


def live(test, n=2, deadline=None):
    async def run():
        params = SamplingParams(prompt="x", seed=0, n=n, num_inference_steps=4)
        ticket = Ticket(GenerationRequest("r0", params, priority=3, deadline=deadline))
        test(LiveRequest(ticket, time.monotonic(), 100))

    asyncio.run(run())


def made(index: int, step: int, seconds_left: float = 1.0) -> Progressed:
    return Progressed("r0", index, "denoising", step, 4, seconds_left, form=COMPILED)


def test_progress_is_that_of_all_outputs():
    def test(request):
        request.advance(made(0, 4, 0.0))
        request.advance(made(1, 1, 6.0))
        progress = request.ticket.progress
        assert (progress.step, progress.num_inference_steps, progress.output_index) == (5, 8, 1)
        assert progress.seconds_left == pytest.approx(3 * 2.0) and progress.percent == 62
        assert request.remaining_cost == pytest.approx(100 * (1 - 5 / 9))

    live(test)


def test_one_output_of_three_says_how_long_the_others_take():
    def test(request):
        request.advance(made(0, 2, 5.0))
        assert request.ticket.progress.seconds_left == pytest.approx(10 * 2.5)

    live(test, n=3)


def test_after_a_workers_death_it_waits_again_in_the_form_that_it_began_in():
    def test(request):
        request.advance(made(0, 3))
        request.outputs[0] = Output([], 0, {})
        assert not request.ticket.waits
        request.begin_again()
        assert request.ticket.waits and request.ticket.progress.step == 0 and not request.outputs
        message, images = request.message()
        assert (message.request_id, message.priority, message.form) == ("r0", 3, COMPILED)
        assert not images and request.remaining_cost == 100

    live(test)


def test_a_deadline_counts_from_the_submission():
    def test(request):
        request.submitted -= 10.0
        message, _ = request.message()
        assert message.deadline == pytest.approx(20.0, abs=1.0)

    live(test, deadline=30.0)
