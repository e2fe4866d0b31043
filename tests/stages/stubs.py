"""A model's conventions without a model, and how its stages are driven."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from safelight.core.calls import ModelCall
from safelight.core.config import PipelineConfig
from safelight.core.params import SamplingParams
from safelight.core.request import Req
from safelight.core.schema import ModelTaskType
from safelight.core.server_args import ServerArgs
from safelight.core.stage import PipelineStage

ARGS = ServerArgs(device="cpu")


class StubConfig(PipelineConfig):
    """Latents of two channels, at half the pixels; guidance by a scale."""

    task = ModelTaskType.T2I
    shared_kwargs = frozenset({"ids"})

    def __init__(self, **changes: Any) -> None:
        super().__init__(**{"vae_scale_factor": 2, "latent_channels": 2, "vae_scale": 0.5, "vae_shift": 1.0, **changes})

    def prepare_latent_shape(self, batch: Req) -> tuple[int, ...]:
        """Half of the size."""
        assert batch.params.height is not None and batch.params.width is not None
        return (1, self.latent_channels, batch.params.height // 2, batch.params.width // 2)

    def prepare_sigmas(self, batch: Req) -> list[float] | None:
        """Evenly down to the last step."""
        steps = batch.params.num_inference_steps or 1
        return [1 - index / steps for index in range(steps)]

    def prepare_cond(self, batch: Req, device: torch.device, dtype: torch.dtype) -> Any:
        """Where and in what."""
        return (device, dtype)

    def should_use_guidance(self, batch: Req) -> bool:
        """With a negative prompt."""
        return batch.params.negative_prompt is not None

    def guidance_scale(self, batch: Req, t: torch.Tensor) -> float:
        """As asked for."""
        assert batch.params.guidance_scale is not None
        return batch.params.guidance_scale

    def prepare_pos_cond_kwargs(self, batch: Req, latent_model_input: Any, t: torch.Tensor) -> dict[str, torch.Tensor]:
        """Of the positive branch."""
        return {"x": latent_model_input, "t": t[None], "ids": torch.ones(1)}

    def prepare_neg_cond_kwargs(self, batch: Req, latent_model_input: Any, t: torch.Tensor) -> dict[str, torch.Tensor]:
        """Of the negative branch: seen by its sign."""
        return {"x": -latent_model_input, "t": t[None], "ids": torch.ones(1)}


def request(**fields: Any) -> Req:
    """Return a request of 8 x 4 pixels in two steps, with one embedding."""
    params = {
        "prompt": "x",
        "height": 8,
        "width": 4,
        "seed": 3,
        "num_inference_steps": 2,
        "output_type": "pt",
        **fields,
    }
    made = Req(request_id="r", params=SamplingParams(**params))
    made.prompt_embeds = [torch.ones(1, 3, 5)]
    return made


def drive(stage: PipelineStage, batch: Req, make: Callable[[ModelCall], Any] | None = None) -> list[list[ModelCall]]:
    """Run a stage to its end, making its calls; return what it yielded."""
    yielded, running = [], stage.run(batch, ARGS)
    try:
        calls = next(running)
        while True:
            yielded.append(calls)
            calls = running.send([make(call) for call in calls] if make else [])
    except StopIteration:
        return yielded
