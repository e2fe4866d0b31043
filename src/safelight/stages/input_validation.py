"""What only the loaded model can check."""

from __future__ import annotations

from safelight.core.config import PipelineConfig
from safelight.core.request import Req
from safelight.core.server_args import ServerArgs
from safelight.core.stage import PipelineStage


class InputValidationStage(PipelineStage):
    """Checks the request against the loaded model, before anything is computed for it."""

    def __init__(self, config: PipelineConfig) -> None:
        self.config = config

    def forward(self, batch: Req, server_args: ServerArgs) -> Req:
        """Raise `InvalidParameterError` for what the model cannot do."""
        self.config.validate(batch)
        return batch
