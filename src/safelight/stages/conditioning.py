"""Joins embeddings, images and tables into what the model is given at every step."""

from __future__ import annotations

from safelight.core.config import PipelineConfig
from safelight.core.request import Req
from safelight.core.server_args import ServerArgs
from safelight.core.stage import PipelineStage


class ConditioningStage(PipelineStage):
    """Makes the family's `cond`, once a request."""

    def __init__(self, config: PipelineConfig) -> None:
        self.config = config

    def forward(self, batch: Req, server_args: ServerArgs) -> Req:
        """Fill `cond`."""
        embeds = batch.prompt_embeds[-1]
        batch.cond = self.config.prepare_cond(batch, embeds.device, embeds.dtype)
        return batch
