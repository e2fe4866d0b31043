"""Videos into files: H.264 in MP4, animated WebP, or a folder of PNGs. Imports no torch."""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from safelight import media
from safelight.errors import InvalidParameterError, OutputError


class Frames(Protocol):
    """uint8 [T, H, W, 3], in memory or in a file."""

    @property
    def shape(self) -> tuple[int, ...]:
        """[T, H, W, 3]."""
        ...

    def __iter__(self) -> Iterator[Any]:
        """Yield frames, [H, W, 3]."""
        ...


METADATA_TAG = "comment"
CRF = "18"
"""Constant quality of H.264: visually lossless, by common experience."""
LOOKAHEAD = "20"
"""Frames that H.264's rate control looks ahead, of which it keeps several copies: half of what its preset has."""
BT709 = 1
"""Of colour primaries, transfer and matrix alike, in H.264's tables."""
LIMITED_RANGE = 1


def _mp4(frames: Frames, path: Path, fps: int, metadata: str) -> None:
    import av
    from av.video.reformatter import ColorRange, Colorspace

    options = {"movflags": "+faststart+use_metadata_tags"}
    with av.open(str(path), "w", format="mp4", options=options) as container:
        container.metadata[METADATA_TAG] = metadata
        stream = container.add_stream(
            "libx264", rate=fps, options={"crf": CRF, "preset": "medium", "rc-lookahead": LOOKAHEAD}
        )
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        context = stream.codec_context
        context.time_base = Fraction(1, fps)
        context.color_range = LIMITED_RANGE
        context.color_primaries = context.color_trc = context.colorspace = BT709
        for pixels in frames:
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            converted = frame.reformat(
                format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG
            )
            container.mux(stream.encode(converted))
        container.mux(stream.encode(None))


def _webp(frames: Frames, path: Path, fps: int, metadata: str) -> None:
    images = (Image.fromarray(frame) for frame in frames)
    next(images).save(
        path,
        format="WEBP",
        save_all=True,
        append_images=images,
        duration=round(1000 / fps),
        loop=0,
        quality=90,
        exif=media.exif(metadata),
    )


VIDEO_WRITERS: Mapping[str, Callable[[Frames, Path, int, str], None]] = {".mp4": _mp4, ".webp": _webp}


def check_output(path: Path, overwrite: bool) -> None:
    """Refuse a path that cannot be written as a video, before any work is done for it.

    A path without an ending is a folder for PNGs, which must not exist yet, or be empty.

    Raises:
        OutputError: naming the path and what it takes.

    """
    if path.suffix.lower() not in (*VIDEO_WRITERS, ""):
        endings = ", ".join(VIDEO_WRITERS)
        takes = f"a name that ends in {endings}, or a folder's name without an ending, for PNGs"
        raise OutputError(f"output: got {str(path)!r}; for a video it takes {takes}")
    media.check_place(path, overwrite)


def save_video(frames: Frames, path: Path, fps: int, metadata: Mapping[str, Any], overwrite: bool = False) -> None:
    """Write a video and how it was made: whole, or not at all.

    Args:
        frames: uint8 [T, H, W, 3]; MP4 needs even heights and widths.
        path: where to; `.mp4` is H.264, `.webp` animated, and a name without an ending a folder of PNGs.
        fps: frames a second.
        metadata: what JSON can hold.
        overwrite: whether an existing file is replaced.

    Raises:
        OutputError: if it cannot be written there.

    """
    check_output(path, overwrite)
    if path.suffix.lower() == ".mp4" and (frames.shape[1] % 2 or frames.shape[2] % 2):
        raise OutputError(f"output: {frames.shape[2]}x{frames.shape[1]} has an odd side, which MP4 cannot hold")
    with _written(path) as made:
        if path.suffix:
            VIDEO_WRITERS[path.suffix.lower()](frames, made, fps, json.dumps(metadata))
        else:
            made.mkdir()
            for index, frame in enumerate(frames):
                media.save_image(Image.fromarray(frame), made / f"{index:05}.png", {**metadata, "frame": index})


def save_file(data: bytes, path: Path, overwrite: bool = False) -> None:
    """Write a video's file as it is: whole, or not at all.

    Raises:
        OutputError: if it cannot be written there.

    """
    check_output(path, overwrite)
    with _written(path) as made:
        made.write_bytes(data)


@contextmanager
def _written(path: Path) -> Iterator[Path]:
    """Give a place beside a path, for a file or a folder that has the path itself once it is whole."""
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".safelight-") as folder:
            made = Path(folder) / path.name
            yield made
            media.put(made, path)
    except OSError as error:
        raise OutputError(f"output: {str(path)!r} cannot be written: {error.strerror or error}") from error


def read_frames(data: bytes) -> Frames:
    """Return the frames of an MP4 that `save_video` wrote."""
    import av
    from av.video.reformatter import ColorRange, Colorspace

    with av.open(io.BytesIO(data), "r") as container:
        frames = [
            frame.reformat(
                format="rgb24",
                src_colorspace=Colorspace.ITU709,
                src_color_range=ColorRange.MPEG,
                dst_color_range=ColorRange.JPEG,
            ).to_ndarray()
            for frame in container.decode(video=0)
        ]
    return np.stack(frames)


def read_metadata(path: Path) -> dict[str, Any]:
    """Return how an MP4 was made, as `save_video` wrote it.

    Raises:
        InvalidParameterError: if it is no video, or carries no parameters of ours.

    """
    import av

    media.check_is_file(path)
    try:
        with av.open(str(path)) as container:
            text = str(container.metadata.get(METADATA_TAG, ""))
    except (OSError, ValueError, av.FFmpegError) as error:
        raise InvalidParameterError("file", str(path), "a picture or video that Safelight made") from error
    return media.parameters_in(text, path)
