"""The package's pipelines in the engine: a UNet, a transformer, a video, two networks, pipelines in a pipeline."""

from __future__ import annotations

import threading
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from safelight import DiffusionGenerator, ServerArgs
from safelight.core.request import Req
from safelight.errors import CancelledError, DeadlineError
from safelight.loading.loader import load_pipeline
from safelight.preparation import prepare
from safelight.runtime.worker.engine import Engine
from safelight.runtime.worker.policy import Policy
from tests.backends.conftest import FIELDS

QUICK = ("StableDiffusionXLPipeline", "KandinskyV22CombinedPipeline")
SLOW = ("StableDiffusion3Pipeline", "LTXPipeline", "StableDiffusionControlNetPipeline")
CLASSES = [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]


@pytest.fixture(scope="module")
def loaded(checkpoint):
    cache = {}

    def of(name):
        if name not in cache:
            # Nothing is kept, so that every request has all of its units.
            cache[name] = load_pipeline(ServerArgs(str(checkpoint(name)), device="cpu", conditioning_cache="0"))
        return cache[name]

    return of


def begun(engine, name, request_id, prompt="a cat", seed=0, n=1, options=None, **fields):
    """Give the engine a request's outputs; return their tasks."""
    asked = {"prompt": prompt, "seed": seed, "n": n, **FIELDS[name], **fields}
    params, _ = prepare(engine.pipeline.schema, asked)
    return [engine.add(Req(request_id, each, at), **(options or {})) for at, each in enumerate(params.split())]


def run(engine):
    while engine.tasks:
        engine.tick()


def alone(pipeline, name, **asked):
    """Return the outputs of a request that nobody shares the engine with."""
    engine = Engine(pipeline)
    tasks = begun(engine, name, "alone", **asked)
    run(engine)
    assert [task.error for task in tasks] == [None] * len(tasks)
    return [task.execution.req.outputs for task in tasks]


def same(tasks, outputs):
    made = [task.execution.req.outputs for task in tasks]
    return [len(each) for each in made] == [len(each) for each in outputs] and all(
        torch.equal(one, other)
        for ours, theirs in zip(made, outputs, strict=True)
        for one, other in zip(ours, theirs, strict=True)
    )


def no_threads():
    return not [thread for thread in threading.enumerate() if thread.name == "safelight-step"]


ASKED: tuple[dict[str, Any], ...] = ({"seed": 3, "n": 2}, {"prompt": "two dogs at dawn", "seed": 8}, {"seed": 3})


@pytest.mark.parametrize("name", CLASSES)
def test_requests_that_begin_at_different_times_have_the_bytes_that_they_have_alone(loaded, name):
    pipeline = loaded(name)
    wanted = [alone(pipeline, name, **asked) for asked in ASKED]
    assert all(map(torch.equal, wanted[0][0], wanted[2][0])) and not torch.equal(wanted[0][0][0], wanted[0][1][0])
    assert not torch.equal(wanted[0][0][0], wanted[1][0][0])
    engine, begun_ones, order = Engine(pipeline, Turns()), [], []
    for number, asked in enumerate(ASKED):
        begun_ones.append(begun(engine, name, f"r{number}", **asked))
        for _ in range(4):
            engine.tick()
    while engine.tasks:
        order += [task.number for task in engine.tick()]
    assert len(set(order[:4])) == 4, "they take turns"
    assert all(same(tasks, outputs) for tasks, outputs in zip(begun_ones, wanted, strict=True))
    assert no_threads()


class Turns(Policy):
    """A policy of turns: whoever was resumed waits until all others were."""

    def __init__(self):
        super().__init__()
        self.turn = {}

    def order(self, tasks, now):
        super().order(tasks, now)
        ordered = sorted(tasks, key=lambda task: self.turn.get(task, -1))
        if ordered:
            self.turn[ordered[0]] = len(self.turn) + max(self.turn.values(), default=0)
        return ordered


@pytest.mark.parametrize("name", CLASSES)
def test_cancelling_after_any_unit_leaves_nothing_and_others_as_they_are(loaded, name):
    pipeline = loaded(name)
    (wanted,) = alone(pipeline, name, seed=5)
    engine, kinds, num_units = Engine(pipeline), [], 0
    (task,) = begun(engine, name, "counted")
    while engine.tasks:
        engine.tick()
        num_units += 1
        kinds.append((task.execution.req.stage, task.execution.req.step_index))
    stages = list(dict.fromkeys(stage for stage, _ in kinds))
    assert stages[1:] in (["text_encoding", "denoising", "decoding"], STAGES_OF.get(name)), stages
    for last in range(1, num_units):
        engine = Engine(pipeline, Turns())
        (other,) = begun(engine, name, "other", seed=5)
        (task,) = begun(engine, name, "cancelled", seed=6)
        units = 0
        while units < last:
            units += task in engine.tick()
        (ended,) = engine.cancel("cancelled")
        assert isinstance(ended.error, CancelledError) and not ended.execution.req.outputs
        assert engine.tasks in ([other], [])
        if last in (1, num_units // 2, num_units - 1):
            run(engine)
            assert same([other], [wanted])
        engine.cancel("other")
        assert no_threads() and not engine.tasks


STAGES_OF = {
    "KandinskyV22CombinedPipeline": ["text_encoding", "denoising", "image_encoding", "decoding"],
}
"""Of classes that do more than to encode texts, to denoise and to decode: a prior, an empty picture, then the rest."""


@pytest.mark.parametrize("name", CLASSES)
def test_progress_counts_every_step_once(loaded, name):
    engine = Engine(loaded(name))
    (task,) = begun(engine, name, "r")
    steps, left = [], []
    while engine.tasks:
        engine.tick()
        steps.append(task.execution.req.step_index)
        left.append(task.steps_left)
    asked = FIELDS[name]["num_inference_steps"] + FIELDS[name].get("prior_num_inference_steps", 0)
    num_steps = asked + (name in ("StableDiffusionControlNetPipeline",))  # its solver makes one of the steps twice
    assert sorted(steps) == steps and set(steps) == set(range(num_steps + 1))
    assert task.execution.req.num_inference_steps == num_steps and left[-1] == 0 < left[0]


@pytest.mark.parametrize("name", CLASSES)
def test_deadlines_priorities_and_room(loaded, name):
    """With room for one, an urgent request takes the place of one whose call has not begun, and of no other."""
    pipeline = loaded(name)
    wanted = alone(pipeline, name, seed=1), alone(pipeline, name, seed=2)
    engine = Engine(pipeline, max_running=1)
    first = begun(engine, name, "first", seed=1)
    engine.tick()
    assert first[0].on_device and first[0].is_movable
    urgent = begun(engine, name, "urgent", seed=2, options={"priority": 1})
    late = begun(engine, name, "late", seed=3, options={"deadline": 0.0})
    engine.tick()
    assert urgent[0].on_device and not first[0].on_device and first[0].execution.started
    assert isinstance(late[0].error, DeadlineError) and no_threads()
    while not urgent[0].calls:
        engine.tick()
    more = begun(engine, name, "more", seed=2, options={"priority": 2})
    engine.tick()
    assert urgent[0].on_device and not urgent[0].is_movable and not more[0].on_device, "it cannot leave"
    run(engine)
    assert same(first, wanted[0]) and same(urgent, wanted[1]) and same(more, wanted[1])
    assert no_threads()


@pytest.mark.parametrize("name", CLASSES)
def test_a_long_request_has_its_share_beside_urgent_ones(loaded, name):
    clock = Ticking()
    engine = Engine(loaded(name), Policy(share=0.5, window=100.0), clock=clock)
    (long,) = begun(engine, name, "long", seed=1, num_inference_steps=30)
    ticks = dict.fromkeys((True, False), 0)
    number = 0
    while long in engine.tasks:
        if not any(task is not long for task in engine.tasks):
            begun(engine, name, f"urgent {number}", seed=2, options={"priority": 5})
            number += 1
        for task in engine.tick():
            ticks[task is long] += 1
        clock.now += 1.0
    assert number > 2 and ticks[True] >= 0.4 * sum(ticks.values()), ticks
    engine.cancel(f"urgent {number - 1}")
    assert no_threads()


class Ticking:
    """A clock that the test moves."""

    now = 0.0

    def __call__(self):
        return self.now


@pytest.mark.parametrize("name", ["StableDiffusionControlNetPipeline", "KandinskyV22CombinedPipeline"])
def test_several_networks_and_pipelines_give_diffusers_bytes(checkpoint, name):
    with DiffusionGenerator.from_pretrained(checkpoint(name), device="cpu") as generator:
        ours = generator.generate("a cat", seed=4, output_type="np", **FIELDS[name]).images
        other = generator.generate("two dogs", seed=4, output_type="np", **FIELDS[name]).images
    pipe = getattr(diffusers, name).from_pretrained(checkpoint(name))
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe("a cat", generator=torch.Generator().manual_seed(4), output_type="np", **FIELDS[name])[0]
    assert np.array_equal(ours, np.asarray(theirs)) and not np.array_equal(ours, other)
