"""What a generation gives back: media in the form asked for, and files of them."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from safelight import media
from safelight.errors import OutputError
from safelight.preparation import prepare
from safelight.results import GenerationResult, in_batch, output_from_files, output_from_media
from tests.serving.stub_engine import IMAGE_SCHEMA, VIDEO_SCHEMA

PIXELS = torch.arange(4 * 6 * 3, dtype=torch.uint8).view(4, 6, 3)


def params_of(schema=IMAGE_SCHEMA, **fields):
    return prepare(schema, {"prompt": "a cat", "seed": 5, "n": 1, **fields})[0]


def test_pictures_are_in_the_form_asked_for():
    made = {
        form: output_from_media([pixels], params_of(output_type=form), {}, [], makes_video=False).images[0]
        for form, pixels in (("pil", PIXELS), ("np", PIXELS / 255), ("pt", PIXELS / 255), ("latent", PIXELS / 255))
    }
    assert made["pil"].size == (6, 4) and np.array_equal(np.asarray(made["pil"]), PIXELS.numpy())
    assert made["np"].shape == (4, 6, 3) and made["np"].dtype == np.float32
    assert torch.equal(made["pt"], made["latent"].movedim(-1, 0))


def test_a_video_is_a_list_of_frames_or_an_array():
    frames, params = torch.stack([PIXELS, PIXELS]), params_of(VIDEO_SCHEMA, output_type="pil")
    made = output_from_media([frames], params, {"decoding": 1.0}, ["short"], makes_video=True)
    assert made.images == [] and [frame.size for frame in made.videos[0]] == [(6, 4)] * 2
    assert (made.seed, made.timings, made.warnings) == (5, {"decoding": 1.0}, ["short"])
    arrays = output_from_media([frames / 255], replace(params, output_type="pt"), {}, [], makes_video=True)
    assert arrays.videos[0].shape == (2, 3, 4, 6)


def png():
    file = io.BytesIO()
    Image.fromarray(PIXELS.numpy()).save(file, format="PNG")
    return file.getvalue()


def test_files_of_a_server_become_what_its_pixels_are():
    made = output_from_files([png()], params_of(output_type="np"), {}, [], makes_video=False)
    assert np.array_equal(made.images[0], PIXELS.numpy() / np.float32(255)) and made.files == []
    picture = output_from_files([png()], params_of(), {}, [], makes_video=False).images[0]
    assert np.array_equal(np.asarray(picture), PIXELS.numpy())


def test_a_batch_is_one_array_unless_sizes_differ():
    same, other = [np.zeros((4, 6, 3)), np.ones((4, 6, 3))], np.zeros((2, 2, 3))
    assert in_batch(same, "np").shape == (2, 4, 6, 3)
    assert isinstance(in_batch([*same, other], "np"), list) and in_batch([], "np") == []
    assert in_batch([torch.zeros(3, 4)] * 2, "pt").shape == (2, 3, 4)


def test_a_result_sums_what_its_outputs_say_and_saves_each_with_its_parameters(tmp_path):
    params = params_of(n=2)
    outputs = [
        output_from_media([PIXELS], each, {"denoising": 1.0 + index}, ["small"], makes_video=False)
        for index, each in enumerate(params.split())
    ]
    result = GenerationResult(outputs, params, IMAGE_SCHEMA, ["general"])
    assert result.timings == {"denoising": 3.0} and result.warnings == ["general", "small"]
    assert result.seeds == [5, 6] and len(result.images) == 2
    paths = result.save(tmp_path / "made.png")
    assert [path.name for path in paths] == ["made-1.png", "made-2.png"]
    assert [media.read_metadata(path)["seed"] for path in paths] == [5, 6]
    arrays = GenerationResult([], replace(params, output_type="np"), IMAGE_SCHEMA)
    with pytest.raises(OutputError, match="output_type: got 'np'; only pil can be written"):
        arrays.save(tmp_path / "other.png")
