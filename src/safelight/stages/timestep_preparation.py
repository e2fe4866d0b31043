"""The schedule: timesteps and sigmas, dynamic shift included."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch

from safelight.core.config import PipelineConfig
from safelight.core.request import Req
from safelight.core.server_args import ServerArgs
from safelight.core.solver import solver_by_name
from safelight.core.stage import PipelineStage


class TimestepPreparationStage(PipelineStage):
    """Gives the request its own solver, set to its schedule."""

    def __init__(self, scheduler: Any, config: PipelineConfig) -> None:
        self.scheduler = scheduler
        self.config = config

    def forward(self, batch: Req, server_args: ServerArgs) -> Req:
        """Fill `scheduler`, `timesteps`, `sigmas` and `num_inference_steps`."""
        name = batch.params.scheduler
        scheduler = copy.deepcopy(self.scheduler if name is None else solver_by_name(name, self.scheduler))
        batch.scheduler = scheduler
        device = server_args.torch_device()
        sigmas = self.config.prepare_sigmas(batch)
        given = {
            "sigmas": None if sigmas is None else np.asarray(sigmas),  # some solvers compute with them as they are
            "timesteps": self.config.prepare_timesteps(batch),
            "mu": self.config.prepare_mu(batch, scheduler.config),
        }
        if given["sigmas"] is None:
            given["num_inference_steps"] = batch.params.num_inference_steps
        scheduler.set_timesteps(device=device, **{name: value for name, value in given.items() if value is not None})
        scheduler.set_begin_index(0)
        batch.timesteps = scheduler.timesteps
        batch.sigmas = torch.as_tensor(scheduler.sigmas).tolist()
        batch.num_inference_steps = len(scheduler.timesteps)
        return batch
