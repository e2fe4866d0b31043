"""Pixels into files, and how they were made."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from safelight import media
from safelight.errors import InvalidParameterError
from safelight.serving.encoding import encode_image, spritesheet, thumbnail
from tests.serving.jobs.folder_outputs import an_output
from tests.serving.stub_engine import IMAGE_SCHEMA


@pytest.mark.parametrize("prompt", ["a", "a [alpha]"])
@pytest.mark.parametrize("output_format", ["png", "webp"])
def test_pixels_come_back_from_lossless_formats(output_format, prompt):
    array = an_output(prompt=prompt).media[0]
    data = encode_image(array, output_format)
    with Image.open(io.BytesIO(data)) as image:
        assert image.format == output_format.upper()
        assert np.array_equal(np.asarray(image), array)


def test_a_png_is_of_level_one():
    data = encode_image(an_output().media[0], "png")
    start = data.index(b"IDAT") + 4
    assert data[start + 1] >> 6 == 0, "zlib's mark of its fastest levels"


@pytest.mark.parametrize("output_format", ["jpeg", "webp"])
def test_compression_is_quality(output_format):
    array = an_output(prompt="[noise]").media[0]
    sizes = [len(encode_image(array, output_format, quality)) for quality in (0, 50, 100)]
    assert sizes == sorted(set(sizes))
    default = encode_image(array, output_format)
    assert len(default) > sizes[1]
    with Image.open(io.BytesIO(default)) as image:
        assert image.format == output_format.upper() and image.size == (96, 64)


def test_jpeg_has_no_alpha_and_unknown_formats_are_named():
    array = an_output(prompt="[alpha]").media[0]
    for output_format, reason in (("jpeg", "alpha"), ("gif", "one of png, jpeg, webp"), ("../png", "one of")):
        with pytest.raises(InvalidParameterError, match=reason) as error:
            encode_image(array, output_format)
        assert error.value.param == "output_format"


@pytest.mark.parametrize("output_format", ["png", "jpeg", "webp"])
@pytest.mark.parametrize("prompt", ["a caf\u00e9", "\U0001f600" * 8000], ids=["short", "long"])
def test_a_picture_says_how_it_was_made(tmp_path, output_format, prompt):
    output = an_output(prompt=prompt)
    metadata = media.file_metadata(IMAGE_SCHEMA.model, IMAGE_SCHEMA.pipeline_name, output.params)
    path = tmp_path / "picture"
    path.write_bytes(encode_image(output.media[0], output_format, None, metadata))
    found = media.read_metadata(path)
    if output_format == "jpeg" and len(prompt) > 1000:  # more than JPEG can hold
        assert found.pop("prompt", None) is None and metadata.pop("prompt")
    assert found == metadata
    assert found["seed"] == 7 and found["model"] == "stub/pictures" and "output_type" not in found


@pytest.mark.parametrize(("count", "grid"), [(1, (1, 1)), (2, (2, 1)), (5, (3, 2)), (16, (4, 4)), (81, (4, 4))])
def test_sheets_show_frames_in_order(count, grid):
    frames = np.stack([np.full((300, 600, 3), 255 * i // max(1, count - 1), np.uint8) for i in range(count)])
    with Image.open(io.BytesIO(spritesheet(frames))) as sheet:
        assert sheet.size == (256 * grid[0], 128 * grid[1])
        grey = np.asarray(sheet.convert("L"))
    tiles = [int(grey[128 * (i // grid[0]) + 9, 256 * (i % grid[0]) + 9]) for i in range(min(count, 16))]
    assert tiles == sorted(set(tiles))
    with Image.open(io.BytesIO(thumbnail(frames))) as image:
        assert image.size == (512, 256)
