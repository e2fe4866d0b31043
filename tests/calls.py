"""Model calls in tests: what makes one as a wrapper on its way does."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from safelight.core.calls import ModelCall
from safelight.core.form import EAGER, Form
from safelight.core.model_runner import Forward, Make, Wrapper
from safelight.core.pipeline import ComposedPipeline
from safelight.core.stage import Steps
from safelight.core.trees import Tree


def through(wrapper: Wrapper, compute: Callable[[ModelCall], Tree], form: Form = EAGER) -> Callable[[ModelCall], Tree]:
    """Return what makes a call behind a wrapper, where `compute` is what comes after it."""

    def make(call: ModelCall) -> Tree:
        (made,) = wrapper([Forward(call, (), form)], lambda forwards: [compute(each.call) for each in forwards])
        return made

    return make


def one_by_one(wrap: Callable[[Forward, Callable[[Forward], Tree]], Tree]) -> Wrapper:
    """Return a wrapper of what is done to each forward by itself."""

    def wrapper(forwards: Sequence[Forward], make: Make) -> list[Tree]:
        return [wrap(forward, lambda each: make([each])[0]) for forward in forwards]

    return wrapper


def driven(pipeline: ComposedPipeline, steps: Steps) -> Iterator[list[ModelCall]]:
    """Drive what a stage's `run` returns to its end, and yield the calls of each of its yields when they are made."""
    calls = next(steps, None)
    while calls is not None:
        results = [pipeline.forward(call) for call in calls]
        yield calls
        try:
            calls = steps.send(results)
        except StopIteration:
            return


def loaded_as(pipeline: ComposedPipeline, **components: Any) -> ComposedPipeline:
    """Return the same pipeline with other components, or others of the decisions about them."""
    changed = dataclasses.replace(pipeline.components, **components)
    return type(pipeline)(changed, pipeline.config, pipeline.schema, pipeline.server_args)
