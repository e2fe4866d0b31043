"""Which solvers draw noise as they step."""

from __future__ import annotations

import pytest
from diffusers import DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from safelight.core.solver import takes_generator


@pytest.mark.parametrize(
    ("solver", "takes"),
    [
        (FlowMatchEulerDiscreteScheduler, True),
        (DDIMScheduler, True),
        (EulerDiscreteScheduler, True),
        (UniPCMultistepScheduler, False),
    ],
)
def test_the_source_of_noise_is_given_where_it_is_taken(solver, takes):
    assert takes_generator(solver) is takes
