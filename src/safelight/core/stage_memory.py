"""What a stage of a request takes of memory beside the weights, by the request's size. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class StageMemory:
    """A stage's bytes: some at any size, some for each pixel of a picture or frame, some for each token of a step.

    Attributes:
        stage: its name.
        fixed: at any size: a text encoder's, for example.
        per_pixel: of a frame: a decoder of videos takes a few at a time.
        per_token: of a forward's sequence, in which frames and input images count.

    """

    stage: str
    fixed: float
    per_pixel: float
    per_token: float

    def of(self, num_pixels: int, num_tokens: int) -> int:
        """Return the bytes for a request of this size."""
        return max(0, round(self.fixed + self.per_pixel * num_pixels + self.per_token * num_tokens))


def largest_need(stages: Iterable[StageMemory], num_pixels: int, num_tokens: int) -> tuple[int, str]:
    """Return the most bytes that a stage takes, and which; 0 where nothing is known."""
    return max(((stage.of(num_pixels, num_tokens), stage.stage) for stage in stages), default=(0, ""))
