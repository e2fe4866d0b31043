"""Parameters of a pipeline that another package has, read from its signature. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from safelight.core.tasks import TaskParams

if TYPE_CHECKING:
    from safelight.core.schema import ModelSchema

UNSTATED_SIDE, TOKEN_SIDE, FRAMES_OF_A_TOKEN = 1024, 16, 8
"""Pixels of a side that the call leaves to the model, and of a latent token's, and its frames: for the estimate of a
request's cost."""


class PackageParams(TaskParams):
    """Parameters of a pipeline of the package, whose model alone knows its own size and multiples."""

    def output_size(self, size_multiple: int) -> tuple[int, int]:
        """Return (height, width) in pixels; a guess where the call does not say, or is not asked: its picture's."""
        width, height = self.image[0].size if self.image else (UNSTATED_SIDE, UNSTATED_SIDE)
        return self.height or height, self.width or width

    def num_latent_tokens(self, schema: ModelSchema) -> int:
        """Return an estimate of an output's tokens; VAEs of videos make one latent frame of four or of eight."""
        height, width = self.output_size(schema.size_multiple)
        num_frames = 1 + ((self.num_frames or 1) - 1) // FRAMES_OF_A_TOKEN
        return -(-height // TOKEN_SIDE) * -(-width // TOKEN_SIDE) * num_frames
