"""The loop of distilled models: clean latents are predicted, and noised again but for the last time."""

from __future__ import annotations

import torch

from safelight.stages.dmd_denoising import DmdDenoisingStage
from tests.stages.stubs import StubConfig, drive, request


def test_each_step_predicts_the_end_and_noises_it_from_the_requests_generator():
    batch = request()
    batch.timesteps, batch.sigmas, batch.num_inference_steps = torch.tensor([1000.0, 400.0]), [1.0, 0.4, 0.0], 2
    batch.latents, batch.generator = torch.full((1, 2, 4, 2), 3.0), torch.Generator().manual_seed(5)
    drive(DmdDenoisingStage(StubConfig()), batch, lambda call: torch.full((1, 2, 4, 2), 2.0))
    noise = torch.randn(1, 2, 4, 2, generator=torch.Generator().manual_seed(5))
    noised = 0.6 * torch.full((1, 2, 4, 2), 3.0 - 1.0 * 2.0) + 0.4 * noise
    torch.testing.assert_close(batch.latents, noised - 0.4 * 2.0)
    assert batch.step_index == 2 and batch.scheduler is None
