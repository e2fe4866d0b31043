"""Schedules that flow-matching models share, against the references' own."""

from __future__ import annotations

import numpy as np
import pytest
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from safelight.stages.schedule import check_takes_sigmas, linear_mu, linear_sigmas, shifted_sigmas


@pytest.mark.parametrize("steps", [1, 4, 50])
def test_noise_levels_are_evenly_spaced(steps):
    assert linear_sigmas(steps) == np.linspace(1.0, 1 / steps, steps).tolist()


@pytest.mark.parametrize("tokens", [16, 256, 1000, 4096, 16384])
def test_the_shift_is_the_references(tokens):
    assert linear_mu(tokens, {}) == pytest.approx(calculate_shift(tokens), rel=1e-12)
    own = {"base_image_seq_len": 128, "max_image_seq_len": 8192, "base_shift": 0.3, "max_shift": 0.9}
    assert linear_mu(tokens, own) == pytest.approx(calculate_shift(tokens, *own.values()), rel=1e-12)


def test_given_timesteps_take_the_nearest_level_of_the_training_schedule():
    trained = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=8.0)
    indices = [0, 1, 499, 999]
    timesteps = [float(trained.timesteps[index]) + 0.01 for index in indices]
    found = shifted_sigmas(timesteps, 8.0, 1000)
    assert found == pytest.approx([float(trained.sigmas[index]) for index in indices], abs=1e-6)


def test_a_solver_of_another_kind_of_noise_is_refused():
    def configs(class_name, **settings):
        return {"model_index": {"scheduler": ["diffusers", class_name]}, "scheduler": settings}

    check_takes_sigmas(configs("FlowMatchEulerDiscreteScheduler"))
    check_takes_sigmas(configs("UniPCMultistepScheduler", use_flow_sigmas=True))
    with pytest.raises(ValueError, match="use_flow_sigmas: this pipeline needs it to be true of UniPC"):
        check_takes_sigmas(configs("UniPCMultistepScheduler"))
