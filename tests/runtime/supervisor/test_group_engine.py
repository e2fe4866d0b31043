"""A model whose ranks are processes, as the Python API sees it: the same pictures, and nothing is left of it."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from safelight.core.server_args import ServerArgs
from safelight.errors import ModelError, SafelightError
from safelight.preparation import prepare
from safelight.runtime.supervisor.group_engine import GroupEngine


@pytest.fixture
def engine(fault_family, fault_folder):
    engine = GroupEngine(ServerArgs(str(fault_folder(step_seconds=0.05, name="group")), device="cpu"))
    yield engine
    engine.close()
    engine.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "safelight-group"]


def outputs_of(engine, **fields):
    params, _ = prepare(engine.schema, {"prompt": "a cat", "seed": 0, "output_type": "np", **fields})
    return params.split()


def test_it_makes_one_output_after_another_and_says_how_far_they_are(engine, expected):
    each = outputs_of(engine, n=2, num_inference_steps=3)
    told = list(engine.stream(each))
    made = [output for _, output in told if output is not None]
    assert [event.output_index for event, output in told if output is not None] == [0, 1]
    steps = [(event.output_index, event.step) for event, _ in told]
    assert steps == sorted(steps) and steps[-1] == (1, 3)
    for seed, output in enumerate(made):
        (picture,) = output.images
        assert np.array_equal(np.asarray(picture), expected(seed=seed, num_inference_steps=3))


def test_leaving_the_loop_stops_the_work_and_the_next_request_runs(engine):
    stream = engine.stream(outputs_of(engine, num_inference_steps=1000))
    next(stream)
    stream.close()
    (*_, (_, output)) = engine.stream(outputs_of(engine, num_inference_steps=1))
    assert output is not None and engine._supervisor.stats.num_running == 0


def test_a_request_that_fails_is_an_error_and_the_engine_goes_on(engine):
    with pytest.raises(SafelightError):
        list(engine.stream(outputs_of(engine, prompt="[error@denoising:1] a cat")))
    (*_, (_, output)) = engine.stream(outputs_of(engine, num_inference_steps=1))
    assert output is not None


def test_of_a_model_that_cannot_be_loaded_nothing_is_left(tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(ModelError):
        GroupEngine(ServerArgs(str(tmp_path), device="cpu"))
    assert not [thread for thread in threading.enumerate() if thread.name == "safelight-group"]
