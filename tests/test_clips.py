"""Videos as inputs: the frames that other readers see, within limits, and everything else refused by name."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from safelight import clips, video
from safelight.clips import EncodedClip, clip_kind, open_clip
from safelight.errors import InvalidParameterError
from tests.clip_files import encoded_clip, moving_frames


def gif():
    file = io.BytesIO()
    first, *others = map(Image.fromarray, moving_frames())
    first.save(file, "GIF", save_all=True, append_images=others, duration=100)
    return file.getvalue()


FILES = {
    "mp4": encoded_clip(),
    "webm": encoded_clip("webm", "libvpx-vp9"),
    "matroska": encoded_clip("matroska"),
    "gif": gif(),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("from_path", [False, True])
def test_a_file_has_the_frames_that_were_written(tmp_path, name, from_path):
    source = FILES[name]
    if from_path:
        source = tmp_path / "clip.bin"  # the ending says nothing
        source.write_bytes(FILES[name])
    clip = open_clip(source, "video")
    assert isinstance(clip, EncodedClip) and (clip.width, clip.height, clip.num_frames) == (48, 32, 5)
    frames = clip.frames()
    assert [frame.size for frame in frames] == [(48, 32)] * 5 and {frame.mode for frame in frames} == {"RGB"}
    difference = np.abs(np.stack([np.asarray(f, np.float32) for f in frames]) - moving_frames()).mean()
    assert difference < 12 and np.abs(moving_frames()[0].astype(float) - moving_frames()[2]).mean() > 20


def test_pictures_are_frames(tmp_path):
    Image.new("RGB", (8, 6), "red").save(tmp_path / "a.png")
    frames = open_clip((tmp_path / "a.png", Image.new("L", (8, 6), 7)), "video")
    assert isinstance(frames, tuple) and [frame.getpixel((0, 0)) for frame in frames] == [(255, 0, 0), (7, 7, 7)]


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (b"", "other bytes"),
        (b"\x89PNG\r\n\x1a\n" + bytes(99), "other bytes"),
        (FILES["mp4"][:200], "damaged MP4"),
        (b"\x1aE\xdf\xa3" + bytes(999), "damaged WebM or Matroska"),
        (b"GIF89a" + bytes(3), "damaged GIF"),
        (encoded_clip("matroska", "ffv1"), "codec ffv1"),
        ("/nowhere/clip.mp4", "No such file"),
        (7, "it takes a path"),
    ],
    ids=lambda value: str(value)[:12],
)
def test_what_is_no_video_is_refused_by_name(source, says):
    with pytest.raises(InvalidParameterError, match=says) as caught:
        open_clip(source, "control_video")
    assert str(caught.value).startswith("control_video: got ") and "\n" not in str(caught.value)


def test_a_video_of_too_many_pixels_is_refused_before_it_is_decoded(monkeypatch):
    monkeypatch.setattr(clips, "MAX_CLIP_PIXELS", 4 * 32 * 48)
    with pytest.raises(InvalidParameterError, match="5 frames of 48x32"):
        open_clip(FILES["mp4"], "video")
    with pytest.raises(ValueError, match="more than"):  # whatever its header said
        EncodedClip(FILES["mp4"], "mp4", (48, 32), 1).check()
    with pytest.raises(InvalidParameterError, match="5 frames"):
        open_clip(tuple(Image.new("RGB", (48, 32)) for _ in range(5)), "video")


def test_a_video_that_ends_early_cannot_be_decoded(tmp_path):
    path = tmp_path / "clip.mp4"
    video.save_video(moving_frames(), path, 8, {})
    whole = path.read_bytes()
    assert clip_kind(whole) == "mp4"
    path.write_bytes(whole[:-400])
    with pytest.raises(InvalidParameterError, match="video"):
        open_clip(path, "video")
