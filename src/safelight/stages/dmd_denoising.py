"""The loop of models distilled to a few steps by distribution matching (DMD2; Yin et al., 2024, arXiv:2405.14867)."""

from __future__ import annotations

import torch
from torch import Tensor

from safelight.core.request import Prediction, Req
from safelight.stages.denoising import DenoisingStage


class DmdDenoisingStage(DenoisingStage):
    """At each step the clean latents are predicted, then noised afresh to the next, lower noise level.

    The noise comes from the request's generator, and the last prediction is the result. No solver steps.
    """

    def advance(self, batch: Req, predictions: list[Prediction]) -> None:
        """Turn the predicted velocity into clean latents, and noise them again unless this was the last step."""
        assert batch.timesteps is not None
        velocity = self.config.combine_guidance(batch, predictions, batch.timesteps[batch.step_index])
        sigma, next_sigma = batch.sigmas[batch.step_index : batch.step_index + 2]
        batch.step_index += 1
        assert isinstance(velocity, Tensor) and isinstance(batch.latents, Tensor)
        batch.latents = batch.latents - sigma * velocity
        if batch.step_index < batch.num_inference_steps:
            noise = torch.randn(batch.latents.shape, generator=batch.generator, dtype=batch.latents.dtype)
            batch.latents = (1 - next_sigma) * batch.latents + next_sigma * noise.to(batch.latents.device)
