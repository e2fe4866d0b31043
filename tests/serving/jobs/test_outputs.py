"""What the engine made becomes files of known names and sizes."""

from __future__ import annotations

import threading

import av
import numpy as np
from PIL import Image

from safelight import media, video
from safelight.core.params import SamplingParams
from safelight.core.sound import Sound
from safelight.results import output_from_files
from safelight.runtime.client import Output
from safelight.serving.jobs import outputs as module
from tests.serving.jobs.folder_outputs import an_output, names, publish, stage, with_outputs
from tests.serving.stub_engine import IMAGE_SCHEMA, VIDEO_SCHEMA


def test_outputs_are_named_files_with_what_is_known_of_them(tmp_path):
    made = [an_output(), an_output(seed=8, width=48)]

    async def use(outputs):
        batch, stored = await stage(outputs, "image_1", made, "png", IMAGE_SCHEMA)
        assert all(name.startswith(".tmp-") for name in names(tmp_path)) and len(names(tmp_path)) == 2
        await outputs.publish(batch)
        return stored

    stored = with_outputs(tmp_path, use)
    assert names(tmp_path) == {"image_1.0.png", "image_1.1.png"}
    first, second = stored
    assert (first.width, first.height, first.seed, first.media_type) == (96, 64, 7, "image/png")
    assert (second.name, second.width, second.seed, second.num_frames) == ("image_1.1.png", 48, 8, None)
    sizes = [(tmp_path / output.name).stat().st_size for output in stored]
    assert [output.num_bytes for output in stored] == sizes
    assert [file.num_bytes for output in stored for file in output.files] == sizes
    with Image.open(tmp_path / second.name) as image:
        assert np.array_equal(np.asarray(image), made[1].media[0])


def test_a_video_has_a_thumbnail_and_a_spritesheet(tmp_path):
    made = an_output(VIDEO_SCHEMA)
    (stored,) = with_outputs(tmp_path, lambda o: publish(o, "video_1", [made], VIDEO_SCHEMA, "mp4"))
    assert (stored.media_type, stored.width, stored.height) == ("video/mp4", 48, 32)
    assert (stored.num_frames, stored.fps, stored.seed) == (9, 8, 7)
    path = tmp_path / stored.name
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert len(list(container.decode(stream))) == 9
        assert stream.average_rate is not None and float(stream.average_rate) == 8.0
    assert video.read_metadata(path) == media.file_metadata(VIDEO_SCHEMA.model, VIDEO_SCHEMA.pipeline_name, made.params)
    extras = stored.extras
    assert names(tmp_path) == {stored.name, *(file.name for file in extras.values())}
    assert [(tmp_path / file.name).stat().st_size for file in extras.values()] == [e.num_bytes for e in extras.values()]
    with Image.open(tmp_path / extras["thumbnail"].name) as image:
        assert (image.format, image.size) == ("WEBP", (48, 32))
    with Image.open(tmp_path / extras["spritesheet"].name) as image:
        assert (image.format, image.size) == ("JPEG", (3 * 48, 3 * 32))


def test_encoding_is_never_in_the_event_loop(tmp_path, monkeypatch):
    threads: list[str] = []

    def noted(function):
        def call(*args):
            threads.append(threading.current_thread().name)
            return function(*args)

        return call

    for name in ("encode_image", "thumbnail", "spritesheet"):
        monkeypatch.setattr(module, name, noted(getattr(module, name)))

    async def use(outputs):
        await publish(outputs, "a", [an_output()])
        await publish(outputs, "b", [an_output(VIDEO_SCHEMA)], VIDEO_SCHEMA, "mp4")

    with_outputs(tmp_path, use)
    assert threads and all(name.startswith("safelight-media") for name in threads)


def test_every_medium_has_a_file_of_its_kind(tmp_path):
    """Pictures of a model that makes videos too; sounds with a video, and alone."""
    rng = np.random.default_rng(0)
    picture, frames = (rng.integers(0, 256, shape, np.uint8) for shape in ((16, 24, 1), (3, 17, 24, 3)))
    sound = Sound(rng.random((2, 8000), np.float32) - 0.5, 16_000)
    params = {"prompt": "a", "seed": 7}
    made = [
        Output([picture], 7, params),
        Output([frames], 7, params, sounds=[sound]),
        Output([], 7, params, sounds=[sound]),
    ]
    stored = with_outputs(tmp_path, lambda o: publish(o, "video_1", made, VIDEO_SCHEMA, "mp4"))
    assert [file.media_type for file in stored] == ["image/png", "video/mp4", "audio/wav"]
    assert [(file.width, file.height, file.fps) for file in stored] == [(24, 16, None), (24, 17, 24), (0, 0, None)]
    found = output_from_files(
        [(tmp_path / file.name).read_bytes() for file in stored], SamplingParams(seed=7, output_type="np"), {}, [], True
    )
    assert np.array_equal(found.images[0] * 255, picture[..., 0]) and found.videos[0].shape == (3, 17, 24, 3)
    assert [each.samples.shape[0] for each in found.sounds] == [2, 2]
    assert np.abs(found.sounds[1].samples - sound.samples).max() < 2 / 32768
