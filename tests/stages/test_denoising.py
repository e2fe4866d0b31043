"""The loop: what it asks of whom, and that the solver and guidance do the rest."""

from __future__ import annotations

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from safelight.stages.denoising import DenoisingStage
from tests.stages.stubs import StubConfig, drive, request


class TwoTransformers(StubConfig):
    """Another one for low noise."""

    def select_component(self, batch, t):
        return "transformer" if t > 600 else "transformer_2"


def prepared(**fields):
    batch = request(**fields)
    batch.scheduler = FlowMatchEulerDiscreteScheduler()
    batch.scheduler.set_timesteps(sigmas=[1.0, 0.5])
    batch.timesteps, batch.sigmas = batch.scheduler.timesteps, batch.scheduler.sigmas.tolist()
    batch.num_inference_steps, batch.latents = 2, torch.ones(1, 2, 4, 2)
    return batch


def test_a_step_asks_for_each_branch_of_the_component_that_runs_it():
    batch = prepared(negative_prompt="y", guidance_scale=3.0)
    yielded = drive(DenoisingStage(TwoTransformers()), batch, lambda call: call.kwargs["x"])
    assert [[call.component for call in calls] for calls in yielded] == [["transformer"] * 2, ["transformer_2"] * 2]
    for step, calls in enumerate(yielded):
        assert [sorted(call.kwargs) for call in calls] == [["t", "x"]] * 2
        assert [list(call.shared_kwargs) for call in calls] == [["ids"]] * 2
        assert [call.kwargs["t"].item() for call in calls] == [batch.timesteps[step]] * 2
        assert len({call.key for call in calls}) == 2, "a branch has a key of its own"


@pytest.mark.parametrize(("fields", "velocity"), [({}, 1), ({"negative_prompt": "y", "guidance_scale": 3.0}, 5)])
def test_the_solver_steps_along_the_guided_prediction(fields, velocity):
    """The branches predict x and -x: guided by 3 that is -x + 3 (x - -x), five times x."""
    batch = prepared(**fields)
    drive(DenoisingStage(StubConfig()), batch, lambda call: call.kwargs["x"])
    expected = 1.0
    for sigma, next_sigma in ((1.0, 0.5), (0.5, 0.0)):
        expected += (next_sigma - sigma) * velocity * expected
    torch.testing.assert_close(batch.latents, torch.full((1, 2, 4, 2), expected))
    assert batch.step_index == 2


def test_a_loop_goes_on_where_the_request_is():
    batch = prepared()
    batch.step_index = 1
    batch.scheduler.set_begin_index(1)
    assert len(drive(DenoisingStage(StubConfig()), batch, lambda call: call.kwargs["x"])) == 1
    torch.testing.assert_close(batch.latents, torch.full((1, 2, 4, 2), 0.5))
