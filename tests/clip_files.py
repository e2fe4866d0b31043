"""Videos as inputs of tests."""

from __future__ import annotations

import io
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray


def moving_frames(count: int = 5, size: tuple[int, int] = (32, 48)) -> NDArray[np.uint8]:
    """Return frames [T, H, W, 3] of which no two are alike."""
    rng = np.random.default_rng(0)
    ramps = np.linspace(0, 255, size[0] * size[1]).reshape(size)
    frames = [np.roll(ramps, 100 * index)[..., None] + rng.integers(0, 9, 3) for index in range(count)]
    return np.stack(frames).clip(0, 255).astype(np.uint8)


def encoded_clip(container: str = "mp4", codec: str = "libx264") -> bytes:
    """Return a file of `moving_frames`."""
    file, array = io.BytesIO(), moving_frames()
    with av.open(file, "w", format=container) as out:
        stream: Any = out.add_stream(codec, rate=8)
        stream.height, stream.width = array.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for pixels in array:
            out.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        out.mux(stream.encode(None))
    return file.getvalue()
