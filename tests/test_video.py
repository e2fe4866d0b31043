"""Videos are what they were made of, say how they are to be shown, and carry their parameters."""

from __future__ import annotations

import errno
import wave

import av
import numpy as np
import pytest
from PIL import Image, ImageSequence

from safelight import video
from safelight.core.sound import Sound
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
    with pytest.raises(OutputError, match="No space left"):
        video.save_video(OnAFullDisk(), path, 8, METADATA, overwrite=True)
    assert path.read_bytes() == b"mine"
    video.save_video(clip(2), path, 8, METADATA, overwrite=True)
    assert video.read_metadata(path) == METADATA
    assert len(list(tmp_path.iterdir())) == 1


class OnAFullDisk:
    """Frames of which the second is lost."""

    shape = (2, 48, 64, 3)

    def __iter__(self):
        yield clip(1)[0]
        raise OSError(errno.ENOSPC, "No space left on device")


def test_odd_sides_keep_their_size(tmp_path):
    frames = clip(3, height=47)[:, :, :-1]
    video.save_video(frames, tmp_path / "clip.mp4", 8, METADATA)
    made = np.asarray(video.read_frames((tmp_path / "clip.mp4").read_bytes()), np.float32)
    assert made.shape == frames.shape and np.abs(made - frames).mean() < 8


def test_one_channel_is_grey(tmp_path):
    frames = clip(2)[..., :1]
    video.save_video(frames, tmp_path / "clip.mp4", 8, METADATA)
    made = np.asarray(video.read_frames((tmp_path / "clip.mp4").read_bytes()), np.float32)
    assert np.abs(made - frames).mean() < 8


RATE = 24_000
WAVE = (0.5 * np.sin(2 * np.pi * np.outer([440.0, 660.0], np.arange(RATE)) / RATE)).astype(np.float32)


@pytest.mark.parametrize("channels", [1, 2])
def test_a_sound_is_the_samples_that_were_made(tmp_path, channels):
    """As another reader finds them."""
    path = tmp_path / "a.wav"
    video.save_sound(Sound(WAVE[:channels], RATE), path, METADATA)
    with wave.open(str(path)) as file:
        assert (file.getframerate(), file.getnchannels(), file.getnframes()) == (RATE, channels, RATE)
        samples = np.frombuffer(file.readframes(RATE), np.int16).reshape(-1, channels).T / 32768
    assert np.abs(samples - WAVE[:channels]).max() < 2 / 32768
    found = video.read_sound(path.read_bytes())
    assert found is not None and found.sampling_rate == RATE and np.abs(found.samples - samples).max() < 1e-4
    assert video.read_metadata(path) == METADATA
    with pytest.raises(OutputError, match=r"ends in \.wav"):
        video.save_sound(Sound(WAVE, RATE), tmp_path / "a.mp3", METADATA)


def test_a_video_holds_its_sound(tmp_path):
    """As AAC, at another rate: its tone is there."""
    path = tmp_path / "clip.mp4"
    video.save_video(clip(8), path, 8, METADATA, sound=Sound(WAVE[:1], RATE))
    heard = video.read_sound(path.read_bytes())
    assert (
        heard is not None and heard.sampling_rate == video.AAC_RATE and abs(heard.samples.shape[1] / 48_000 - 1) < 0.1
    )
    spectrum = np.abs(np.fft.rfft(heard.samples[0]))
    assert abs(spectrum.argmax() / heard.samples.shape[1] * 48_000 - 440) < 2
    assert video.read_frames(path.read_bytes()).shape[0] == 8 and video.read_metadata(path) == METADATA
    video.save_video(clip(8), tmp_path / "silent.mp4", 8, METADATA)
    assert video.read_sound((tmp_path / "silent.mp4").read_bytes()) is None
