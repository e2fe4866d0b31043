"""What makes calls: wrappers in their order, each given what the one before lets through."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from safelight.core.calls import CallKey, ModelCall
from safelight.core.form import EAGER, Form
from safelight.core.model_runner import Forward, ModelRunner, resident
from tests.calls import one_by_one


def forward(component="double", value=1.0):
    return Forward(ModelCall(component, {"x": torch.tensor([value])}, {}, (), CallKey("r/0", "cond", 0)), ())


def pipeline(**more):
    made: Any = SimpleNamespace(forward=lambda call: call.kwargs["x"] * 2, **more)
    return made


def test_the_outermost_is_first():
    seen = []

    def noting(name):
        def wrapper(forwards, make):
            seen.append((name, len(forwards)))
            return make(forwards)

        return wrapper

    runner = ModelRunner(pipeline(), [noting("a"), noting("b")])
    assert [made.item() for made in runner.run([forward(), forward(value=2.0)])] == [2, 4]
    assert seen == [("a", 2), ("b", 2)]
    assert runner.run([]) == [] and len(seen) == 2, "of nothing nobody hears"


def test_a_wrapper_may_answer_by_itself():
    def every_second(forwards, make):
        made = iter(make(forwards[::2]))
        return [next(made) if index % 2 == 0 else torch.zeros(1) for index in range(len(forwards))]

    made = ModelRunner(pipeline(), [every_second]).run([forward(value=float(index)) for index in range(4)])
    assert [each.item() for each in made] == [0, 0, 4, 0]


def test_calls_run_in_inference_mode_and_leave_it():
    def look(one, make):
        assert torch.is_inference_mode_enabled()
        return make(one)

    ModelRunner(pipeline(), [one_by_one(look)]).run([forward()])
    assert not torch.is_inference_mode_enabled()


def test_a_component_is_brought_before_it_runs():
    brought: list[str] = []
    model = pipeline(residency=SimpleNamespace(bring=brought.extend))
    ModelRunner(model, [resident(model)]).run([forward(), forward("other")])
    assert brought == ["double", "other"]


@pytest.mark.parametrize(("form", "has"), [(EAGER, True), (Form("compiled"), False)])
def test_without_more_there_is_the_eager_form_alone(form, has):
    runner = ModelRunner(pipeline(), [])
    assert (runner.has(form), runner.may_have(form), runner.form) == (has, has, EAGER)
