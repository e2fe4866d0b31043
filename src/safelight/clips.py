"""Videos as inputs: files that stay files until their frames are needed. Imports no torch."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
from PIL import Image

from safelight import media
from safelight.core.options import MAX_CLIP_FRAMES
from safelight.encoded import Kept
from safelight.errors import InvalidParameterError

CLIP_FORMATS: Mapping[str, str] = {"mp4": "an MP4", "matroska": "a WebM or Matroska", "gif": "a GIF"}
"""What is read, by the demuxer's name. No other demuxer is asked, whatever a file says that it is."""
CODECS = frozenset({"h264", "hevc", "vp8", "vp9", "av1", "libdav1d", "libvpx", "libvpx-vp9", "mpeg4", "gif"})
"""Decoders that are used: of the hundreds that there are, those that videos of today need."""
MAX_CLIP_PIXELS = 1 << 28
"""Of all frames together: 0.8 GB once they are decoded."""
MAX_CLIP_BYTES = 256 << 20
"""Of a file that is opened by its path."""
_TAKES = (
    f"an MP4, WebM, Matroska or GIF file of at most {MAX_CLIP_FRAMES} frames and {MAX_CLIP_PIXELS >> 20} megapixels"
)
_TAKES_EITHER = f"{_TAKES}, or a list of images that are its frames"


class EncodedClip:
    """A video whose frames are decoded when they are needed, and not kept.

    Args:
        file: an MP4, WebM, Matroska or GIF file, or where it is kept.
        kind: one of `CLIP_FORMATS`.
        size: (width, height) in pixels.
        num_frames: as the file says it, or as its length and its rate let one think.

    """

    def __init__(self, file: bytes | Kept, kind: str, size: tuple[int, int], num_frames: int) -> None:
        self._file, self.kind, self.num_frames = file, kind, num_frames
        self.width, self.height = size

    @property
    def file(self) -> bytes:
        """The file; of one that is kept elsewhere, read anew each time."""
        return self._file if isinstance(self._file, bytes) else self._file.read()

    @classmethod
    def read(cls, file: bytes, param: str, kept: Kept | None = None) -> Self:
        """Read what a file says of itself.

        Args:
            file: its bytes.
            param: the field that an error names.
            kept: where the file is kept, in the place of its bytes.

        Raises:
            InvalidParameterError: if it is no such file, or too large.

        """
        import av

        kind = clip_kind(file)
        if kind is None:
            raise InvalidParameterError(param, "other bytes", _TAKES_EITHER)
        try:
            with av.open(io.BytesIO(file), "r", format=kind) as container:
                (stream,) = container.streams.video[:1]
                codec, rate = stream.codec_context, stream.average_rate
                size = (codec.width, codec.height)
                guessed = float((container.duration or 0) / 1_000_000 * (rate or 0))
                num_frames = stream.frames or max(1, round(guessed))
                if codec.name not in CODECS:
                    raise InvalidParameterError(param, f"a video of the codec {codec.name}", _TAKES)
        except (av.FFmpegError, ValueError, OverflowError, MemoryError, OSError) as error:
            raise damaged_clip(kind, param) from error
        if min(size) < 1 or num_frames > MAX_CLIP_FRAMES or size[0] * size[1] * num_frames > MAX_CLIP_PIXELS:
            raise InvalidParameterError(param, f"{num_frames} frames of {size[0]}x{size[1]}", _TAKES)
        return cls(file if kept is None else kept, kind, size, num_frames)

    def frames(self) -> list[Image.Image]:
        """Decode the frames, RGB, upright.

        Raises:
            ValueError: if the file cannot be decoded, or has more frames or pixels than are taken.

        """
        return [Image.fromarray(frame) for frame in self._decoded()]

    def check(self) -> None:
        """Decode every frame once, and keep none.

        Raises:
            ValueError: what `frames` would.

        """
        for _ in self._decoded():
            pass

    def _decoded(self) -> Iterator[Any]:
        """Yield frames, uint8 [H, W, 3]."""
        import av

        num_frames = num_pixels = 0
        try:
            with av.open(io.BytesIO(self.file), "r", format=self.kind) as container:
                for frame in container.decode(video=0):
                    num_frames, num_pixels = num_frames + 1, num_pixels + frame.width * frame.height
                    if num_frames > MAX_CLIP_FRAMES or num_pixels > MAX_CLIP_PIXELS:
                        raise ValueError(f"more than {MAX_CLIP_FRAMES} frames, or {MAX_CLIP_PIXELS} pixels")
                    array = frame.to_ndarray(format="rgb24")
                    yield np.ascontiguousarray(np.rot90(array, round(frame.rotation / 90) % 4))
        except (av.FFmpegError, MemoryError) as error:
            raise ValueError("the video cannot be decoded") from error
        if not num_frames:
            raise ValueError("the video has no frames")


Clip = EncodedClip | tuple[Image.Image, ...]
"""A video's file, or its frames."""


def clip_kind(head: bytes) -> str | None:
    """Return the format of a video by its first bytes; None for what is not taken."""
    if head[4:8] == b"ftyp":
        return "mp4"
    if head.startswith(b"\x1aE\xdf\xa3"):
        return "matroska"
    return "gif" if head.startswith((b"GIF87a", b"GIF89a")) else None


def damaged_clip(kind: str, param: str) -> InvalidParameterError:
    """Return the error for a file of a format that is no whole video."""
    return InvalidParameterError(param, f"a damaged {CLIP_FORMATS[kind].partition(' ')[2]} file", _TAKES)


def open_clip(source: Any, param: str, mode: str = "RGB") -> Clip:
    """Return a video as an input.

    Args:
        source: an `EncodedClip`; the bytes or the path of a video; or a list of what `open_image` takes: its frames.
        param: the field that an error names.
        mode: of frames that are pictures.

    Raises:
        InvalidParameterError: if it cannot be read as such, or is too large.

    """
    if isinstance(source, EncodedClip):
        return source
    if isinstance(source, bytes):
        return EncodedClip.read(source, param)
    if isinstance(source, tuple):
        frames = tuple(media.open_image(entry, param, mode) for entry in source)
        if sum(frame.width * frame.height for frame in frames) > MAX_CLIP_PIXELS:
            raise InvalidParameterError(param, f"{len(frames)} frames", _TAKES)
        return frames
    if not isinstance(source, str | os.PathLike):
        raise InvalidParameterError(param, source, f"a path, or the bytes, of {_TAKES_EITHER}")
    try:
        with Path(source).open("rb") as file:
            found = EncodedClip.read(file.read(MAX_CLIP_BYTES + 1), param)
        if len(found.file) > MAX_CLIP_BYTES:
            raise InvalidParameterError(param, os.fspath(source), f"a file of at most {MAX_CLIP_BYTES >> 20} MiB")
        found.check()
    except (OSError, ValueError) as error:
        raise InvalidParameterError(param, os.fspath(source), f"{_TAKES_EITHER} ({media.reason_of(error)})") from error
    return found
