"""Images at Poisson arrivals beside videos that never end, on a virtual clock."""

from __future__ import annotations

import pytest

from benchmarks.serving import FirstComeFirstServed, simulate, stacked_pipeline, stream_row_steps
from safelight.runtime.worker.engine import Engine
from safelight.runtime.worker.policy import Policy
from tests.runtime.conftest import request


@pytest.mark.parametrize("seed", [0, 1, 7])
def test_videos_hardly_slow_images_down(fault_pipeline, clock, seed):
    pipeline = fault_pipeline(step_seconds=1.0)
    asked = {"load": 0.5, "images": 150, "seed": seed}
    alone = simulate(pipeline, clock, **asked, policy=Policy(window=600), video=False)
    both = simulate(pipeline, clock, **asked, policy=Policy(window=600), video=True)
    queue = simulate(pipeline, clock, **asked, policy=FirstComeFirstServed(), video=True)
    assert both.p95 <= 1.5 * alone.p95
    assert queue.p95 > 4 * alone.p95, "the arrivals are ones that a plain queue serves badly"
    assert both.video_share > 0.4, "half of the time is the images'"


@pytest.mark.parametrize("load", [0.95, 1.5])
def test_an_overload_of_images_leaves_the_video_its_share(fault_pipeline, clock, load):
    pipeline = fault_pipeline(step_seconds=1.0)
    policy = Policy(share=0.1, window=600)
    both = simulate(pipeline, clock, load=load, images=150, seed=3, policy=policy, video=True)
    assert both.video_share >= 0.09


@pytest.mark.parametrize("patience", [None, 8000.0])
@pytest.mark.parametrize("between", [0.0, 9.0])
def test_long_requests_have_their_share_and_no_more_on_a_host_that_is_busy(fault_pipeline, clock, between, patience):
    """A short one among twenty long ones, where a step takes a second and much passes before the next one.

    Whether or not all are to begin within some time of when they came, as all are whose clients wait for an answer.
    """
    pipeline = fault_pipeline(step_seconds=1.0)
    engine = Engine(pipeline, clock=clock)
    for index in range(20):
        engine.add(request(pipeline, request_id=f"r{index}", num_inference_steps=1000), deadline=patience)
    for _ in range(50):
        engine.tick()
        clock.sleep(between)
    short = engine.add(request(pipeline, request_id="short", num_inference_steps=4), deadline=patience)
    num_units = 0
    while not short.done:
        engine.tick()
        clock.sleep(between)
        num_units += 1
    assert num_units <= 12


def test_a_stream_of_requests_keeps_the_batch_full():
    """Of requests of mixed lengths, eight run at a time: hardly a forward has fewer rows."""
    pipeline, rows = stacked_pipeline(), []
    hook = lambda module, args, kwargs, output: rows.append(len(output))  # noqa: E731
    pipeline.get_module("transformer").register_forward_hook(hook, with_kwargs=True)
    steps = [4, 9, 2, 7, 5, 3, 8, 6] * 4
    total = stream_row_steps(pipeline, steps, "throughput")
    assert sum(rows) == total
    assert total / len(rows) > 7.5
    assert isinstance(Engine(pipeline).policy, Policy)
