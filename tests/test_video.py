"""Videos are what they were made of, say how they are to be shown, and carry their parameters."""

from __future__ import annotations

import av
import numpy as np
import pytest
from PIL import Image, ImageSequence

from safelight import video
from safelight.errors import OutputError

METADATA = {"prompt": "naïve 漢字", "seed": 2**53}


def clip(num_frames=9, height=48, width=80):
    """Saturated colours that move: a wrong matrix or range shows."""
    frames = np.zeros((num_frames, height, width, 3), np.uint8)
    for index, frame in enumerate(frames):
        frame[:, : width // 2] = (220, 30, 40)
        frame[:, width // 2 :] = (20, 60, 200)
        frame[10:30, 4 + 6 * index : 20 + 6 * index] = (250, 240, 60)
    return frames


@pytest.mark.parametrize(("fps", "num_frames"), [(16, 9), (24, 1), (30, 13)])
def test_mp4(tmp_path, fps, num_frames):
    frames, path = clip(num_frames), tmp_path / "clip.mp4"
    video.save_video(frames, path, fps, METADATA)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        context = stream.codec_context
        assert (stream.codec.name, context.pix_fmt) == ("h264", "yuv420p")
        assert (context.color_primaries, context.color_trc, context.colorspace, context.color_range) == (1, 1, 1, 1)
        assert stream.average_rate == fps
        decoded = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
    assert len(decoded) == num_frames
    assert np.abs(np.stack(decoded).astype(int) - frames)[:, :, 2:38].mean() < 4
    data = path.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat"), "the index comes first, so that playing starts at once"
    assert video.read_metadata(path) == METADATA
    assert [entry.name for entry in tmp_path.iterdir()] == ["clip.mp4"]


def test_animated_webp(tmp_path):
    frames, path = clip(5), tmp_path / "clip.webp"
    video.save_video(frames, path, 10, METADATA)
    with Image.open(path) as image:
        assert (len(list(ImageSequence.Iterator(image))), image.size) == (5, (80, 48))
        image.seek(3)
        image.load()
        assert image.info["duration"] == 100
        assert np.abs(np.asarray(image.convert("RGB")).astype(int) - frames[3]).mean() < 6


def test_folder_of_pngs(tmp_path):
    frames, path = clip(3), tmp_path / "frames"
    video.save_video(frames, path, 10, METADATA)
    pictures = sorted(path.iterdir())
    assert [picture.name for picture in pictures] == ["00000.png", "00001.png", "00002.png"]
    assert all(np.array_equal(np.asarray(Image.open(p)), frame) for p, frame in zip(pictures, frames, strict=True))
    with pytest.raises(OutputError, match="exists already"):
        video.save_video(frames, path, 10, METADATA, overwrite=True)


@pytest.mark.parametrize("length", [200, 251, 255])
@pytest.mark.parametrize("ending", [".mp4", ".webp", ""])
def test_the_longest_names(tmp_path, length, ending):
    """Whatever passes the check before the work is done can be written after it."""
    path = tmp_path / ("x" * (length - len(ending)) + ending)
    video.check_output(path, overwrite=False)
    video.save_video(clip(1), path, 8, METADATA)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("name", ["clip.png", "clip.avi", "nowhere/clip.mp4", "/proc/clip.mp4", "x" * 256, "a\0b.mp4"])
def test_where_a_video_cannot_go(tmp_path, name):
    with pytest.raises(OutputError, match="output: "):
        video.check_output(tmp_path / name, overwrite=False)


def test_nothing_is_overwritten_unless_asked_and_nothing_is_half_written(tmp_path):
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"mine")
    with pytest.raises(OutputError, match="exists already"):
        video.save_video(clip(2), path, 8, METADATA)
    with pytest.raises(OutputError, match="odd side"):
        video.save_video(clip(2, height=47), path, 8, METADATA, overwrite=True)
    assert path.read_bytes() == b"mine"
    video.save_video(clip(2), path, 8, METADATA, overwrite=True)
    assert video.read_metadata(path) == METADATA
    assert len(list(tmp_path.iterdir())) == 1
