"""Each request has a solver of its own, set to its schedule."""

from __future__ import annotations

import pytest
from diffusers import FlowMatchEulerDiscreteScheduler

from safelight.stages.timestep_preparation import TimestepPreparationStage
from tests.stages.stubs import StubConfig, drive, request


class Shifted(StubConfig):
    """The schedule is shifted by a number."""

    def prepare_mu(self, batch, scheduler_config):
        return 0.7


class LeftToIt(StubConfig):
    """The solver spaces its noise levels itself."""

    def prepare_sigmas(self, batch):
        return None


@pytest.mark.parametrize(
    ("config", "dynamic", "given"),
    [
        (StubConfig(), False, {"sigmas": [1.0, 0.75, 0.5, 0.25]}),
        (Shifted(), True, {"sigmas": [1.0, 0.75, 0.5, 0.25], "mu": 0.7}),
        (LeftToIt(), False, {"num_inference_steps": 4}),
    ],
    ids=["sigmas", "shifted", "left to the solver"],
)
def test_the_schedule_is_the_solvers(config, dynamic, given):
    loaded = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=dynamic)
    batch, other = request(num_inference_steps=4), request(num_inference_steps=3)
    for each in (batch, other):
        drive(TimestepPreparationStage(loaded, config), each)
    expected = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=dynamic)
    expected.set_timesteps(**given)
    assert batch.timesteps is not None and batch.timesteps.tolist() == expected.timesteps.tolist()
    assert batch.sigmas == expected.sigmas.tolist() and len(batch.sigmas) == 5
    assert (batch.num_inference_steps, other.num_inference_steps) == (4, 3)
    assert batch.scheduler is not other.scheduler and batch.scheduler is not loaded
    assert batch.scheduler.begin_index == 0 and loaded.begin_index is None
