"""Sound: samples, and how many of them are a second. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, eq=False)
class Sound:
    """A sound that was made, alone or with a video.

    Attributes:
        samples: float32 [C, S] in [-1, 1]: a tensor, or an array of NumPy's.
        sampling_rate: samples a second.

    """

    samples: Any
    sampling_rate: int
