"""Which solvers draw noise as they step, in all of the package."""

from __future__ import annotations

import inspect
from typing import Any

import diffusers
import pytest

from safelight.core.solver import takes_generator

SOLVERS: dict[str, Any] = {
    name: cls
    for name in dir(diffusers)
    if name.endswith("Scheduler") and inspect.isclass(cls := getattr(diffusers, name)) and hasattr(cls, "step")
}


@pytest.mark.parametrize(
    ("name", "takes"),
    [("FlowMatchEulerDiscreteScheduler", True), ("DDIMScheduler", True), ("UniPCMultistepScheduler", False)],
)
def test_the_source_of_noise_is_given_where_it_is_taken(name, takes):
    assert takes_generator(SOLVERS[name]) is takes


def test_there_are_solvers_of_both_kinds():
    assert {takes_generator(cls) for cls in SOLVERS.values()} == {True, False}
