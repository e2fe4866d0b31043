"""Videos into files: H.264 in MP4, animated WebP, or a folder of PNGs; and sounds, in these or as WAV. No torch."""

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
from safelight.core.sound import Sound
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
AAC_RATE = 48_000
"""Samples a second of a video's sound, whatever the model's are: AAC has few rates."""
_SAMPLES = 1 << 16


def _mp4(frames: Frames, path: Path, fps: float, metadata: str, sound: Sound | None) -> None:
    import av
    from av.video.reformatter import ColorRange, Colorspace

    options = {"movflags": "+faststart+use_metadata_tags"}
    with av.open(str(path), "w", format="mp4", options=options) as container:
        container.metadata[METADATA_TAG] = metadata
        rate = Fraction(fps).limit_denominator(1001)
        stream = container.add_stream(
            "libx264", rate=rate, options={"crf": CRF, "preset": "medium", "rc-lookahead": LOOKAHEAD}
        )
        stream.height, stream.width = frames.shape[1:3]
        # Half the colours of a side need an even one.
        stream.pix_fmt = pixels_as = "yuv444p" if stream.height % 2 or stream.width % 2 else "yuv420p"
        context = stream.codec_context
        context.time_base = 1 / rate
        context.color_range = LIMITED_RANGE
        context.color_primaries = context.color_trc = context.colorspace = BT709
        audio = None if sound is None else container.add_stream("aac", rate=AAC_RATE, layout=layout_of(sound))
        for pixels in frames:
            frame = av.VideoFrame.from_ndarray(as_rgb(pixels), format="rgb24")
            converted = frame.reformat(
                format=pixels_as, dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG
            )
            container.mux(stream.encode(converted))
        container.mux(stream.encode(None))
        if sound is not None and audio is not None:
            for heard in _resampled(sound, "fltp", AAC_RATE):
                container.mux(audio.encode(heard))
            container.mux(audio.encode(None))


def _webp(frames: Frames, path: Path, fps: float, metadata: str, sound: Sound | None) -> None:
    images = (Image.fromarray(as_rgb(frame)) for frame in frames)
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


def as_rgb(pixels: Any) -> Any:
    """Return a frame [H, W, 3] of one [H, W, C] of one channel, or of three or four."""
    return np.repeat(pixels, 3, axis=-1) if pixels.shape[-1] == 1 else np.ascontiguousarray(pixels[..., :3])


def layout_of(sound: Sound) -> str:
    """Return the name of a sound's channels; of more than two the first two are heard."""
    return "mono" if sound.samples.shape[0] == 1 else "stereo"


def _resampled(sound: Sound, form: str, rate: int) -> Iterator[Any]:
    """Yield a sound's frames in another form and at another rate."""
    import av

    samples = np.ascontiguousarray(np.asarray(sound.samples, np.float32)[:2])
    resampler = av.AudioResampler(format=form, layout=layout_of(sound), rate=rate)
    for begin in range(0, samples.shape[1], _SAMPLES):
        piece = np.ascontiguousarray(samples[:, begin : begin + _SAMPLES])
        frame = av.AudioFrame.from_ndarray(piece, format="fltp", layout=layout_of(sound))
        frame.sample_rate, frame.pts, frame.time_base = sound.sampling_rate, begin, Fraction(1, sound.sampling_rate)
        yield from resampler.resample(frame)
    yield from resampler.resample(None)


def save_sound(sound: Sound, path: Path, metadata: Mapping[str, Any], overwrite: bool = False) -> None:
    """Write a sound and how it was made as WAV of 16 bits: whole, or not at all.

    Raises:
        OutputError: if it cannot be written there.

    """
    import av

    check_sound_output(path, overwrite)
    with _written(path) as made, av.open(str(made), "w", format="wav") as container:
        container.metadata[METADATA_TAG] = json.dumps(metadata)
        stream = container.add_stream("pcm_s16le", rate=sound.sampling_rate, layout=layout_of(sound))
        for heard in _resampled(sound, "s16", sound.sampling_rate):
            container.mux(stream.encode(heard))
        container.mux(stream.encode(None))


def read_sound(data: bytes) -> Sound | None:
    """Return the sound of a file that `save_sound` or `save_video` wrote, float32; None where it has none."""
    import av

    with av.open(io.BytesIO(data), "r") as container:
        if not container.streams.audio:
            return None
        rate, layout = container.streams.audio[0].rate, container.streams.audio[0].layout.name
        resampler = av.AudioResampler(format="fltp", layout=layout, rate=rate)
        frames = [made.to_ndarray() for frame in container.decode(audio=0) for made in resampler.resample(frame)]
    return Sound(np.concatenate(frames, axis=1), rate)


def check_sound_output(path: Path, overwrite: bool) -> None:
    """Refuse a path that cannot be written as a sound.

    Raises:
        OutputError: naming the path and what it takes.

    """
    if path.suffix.lower() != ".wav":
        raise OutputError(f"output: got {str(path)!r}; for a sound it takes a name that ends in .wav")
    media.check_place(path, overwrite)


VIDEO_WRITERS: Mapping[str, Callable[[Frames, Path, float, str, Sound | None], None]] = {".mp4": _mp4, ".webp": _webp}


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


def save_video(
    frames: Frames,
    path: Path,
    fps: float,
    metadata: Mapping[str, Any],
    overwrite: bool = False,
    sound: Sound | None = None,
) -> None:
    """Write a video and how it was made: whole, or not at all.

    Args:
        frames: uint8 [T, H, W, C]. MP4 of an odd height or width has all colours (4:4:4), which not every player shows.
        path: where to; `.mp4` is H.264, `.webp` animated, and a name without an ending a folder of PNGs.
        fps: frames a second.
        metadata: what JSON can hold.
        overwrite: whether an existing file is replaced.
        sound: of the video, as AAC in the MP4; beside a folder's PNGs as `sound.wav`. WebP is silent.

    Raises:
        OutputError: if it cannot be written there.

    """
    check_output(path, overwrite)
    with _written(path) as made:
        if path.suffix:
            VIDEO_WRITERS[path.suffix.lower()](frames, made, fps, json.dumps(metadata), sound)
        else:
            made.mkdir()
            for index, frame in enumerate(frames):
                picture = Image.fromarray(as_rgb(frame))
                media.save_image(picture, made / f"{index:05}.png", {**metadata, "frame": index})
            if sound is not None:
                save_sound(sound, made / "sound.wav", metadata)


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
