"""Pictures in and out of files: whole or not at all, and nothing decoded that is too large."""

from __future__ import annotations

import errno
import io
import json
import os
import random
import stat
import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

from safelight import media
from safelight.errors import InvalidParameterError, OutputError

METADATA = {"prompt": 'naïve 漢字 \U0001f431 \n"x"', "seed": 2**64 - 1, "sigmas": [1.0, 0.5], "image": None}


def picture(width=33, height=17):
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack((x, y, 255 - x), axis=-1).astype(np.uint8))


def array(image):
    return np.asarray(image, dtype=np.int16)


# Writing


@pytest.mark.parametrize(
    ("suffix", "kind", "tolerance"),
    [(".png", "PNG", 0), (".webp", "WEBP", 0), (".jpg", "JPEG", 12), (".JPEG", "JPEG", 12)],
)
def test_round_trip(tmp_path, suffix, kind, tolerance):
    path = tmp_path / f"x{suffix}"
    media.save_image(picture(), path, METADATA)
    assert media.read_metadata(path) == METADATA
    with Image.open(path) as image:
        assert (image.format, image.mode, image.size) == (kind, "RGB", (33, 17))
        assert np.abs(array(image) - array(picture())).max() <= tolerance
    assert np.abs(array(media.open_image(path)) - array(picture())).max() <= tolerance


def test_parameters_lie_where_other_programs_look(tmp_path):
    media.save_image(picture(), tmp_path / "x.png", METADATA)
    media.save_image(picture(), tmp_path / "x.jpg", METADATA)
    with Image.open(tmp_path / "x.png") as image:
        assert json.loads(image.info["parameters"]) == METADATA
    with Image.open(tmp_path / "x.jpg") as image:
        comment = image.getexif().get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment]
    assert comment[:8] == b"ASCII\0\0\0" and json.loads(comment[8:]) == METADATA


@pytest.mark.parametrize("suffix", media.IMAGE_FORMATS)
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_failure_in_the_middle_leaves_nothing(tmp_path, monkeypatch, suffix, overwrite):
    path = tmp_path / f"x{suffix}"
    if overwrite:
        path.write_text("mine")

    def full(target, data):
        target.write_text("half a picture")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OutputError, match="No space left on device"):
        media.save_image(picture(), path, METADATA, overwrite)
    assert [entry.name for entry in tmp_path.iterdir()] == ([path.name] if overwrite else [])
    assert not overwrite or path.read_text() == "mine"


def test_an_interrupt_in_the_middle_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(target, data):
        target.write_text("half a picture")
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_bytes", interrupted)
    with pytest.raises(KeyboardInterrupt):
        media.save_image(picture(), tmp_path / "x.png", METADATA)
    assert list(tmp_path.iterdir()) == []


def test_a_reader_sees_the_old_picture_or_the_new_one(tmp_path, monkeypatch):
    path = tmp_path / "x.png"
    media.save_image(picture(), path, {"number": 1})
    write, seen = Path.write_bytes, []

    def watched(target, data):
        write(target, data)
        seen.append(media.read_metadata(path)["number"])

    monkeypatch.setattr(Path, "write_bytes", watched)
    media.save_image(picture(), path, {"number": 2}, overwrite=True)
    assert [*seen, media.read_metadata(path)["number"]] == [1, 2]


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o000])
def test_files_have_the_mode_of_new_files(tmp_path, mask):
    before = os.umask(mask)
    try:
        media.save_image(picture(), tmp_path / "x.png", METADATA)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x.png").stat().st_mode) == 0o666 & ~mask


def test_a_folder_that_goes_away(tmp_path, monkeypatch):
    monkeypatch.setattr(media, "check_output", lambda *args: None)
    with pytest.raises(OutputError, match="No such file"):
        media.save_image(picture(), tmp_path / "gone" / "x.png", METADATA)


@pytest.mark.parametrize("length", [200, 255])
def test_the_longest_names(tmp_path, length):
    path = tmp_path / f"{'x' * (length - 4)}.png"
    media.save_image(picture(), path, METADATA)
    assert media.read_metadata(path) == METADATA
    with pytest.raises(OutputError, match="too long"):
        media.save_image(picture(), tmp_path / f"{'x' * 252}.png", METADATA)


def test_more_parameters_than_a_format_holds(tmp_path):
    long = {"prompt": "x" * 70_000}
    with pytest.raises(OutputError, match="too long"):
        media.save_image(picture(), tmp_path / "x.jpg", long)
    assert list(tmp_path.iterdir()) == []
    media.save_image(picture(), tmp_path / "x.png", long)
    assert media.read_metadata(tmp_path / "x.png") == long


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
@pytest.mark.parametrize("suffix", [".jpg", ".JPEG"])
def test_transparency_is_not_lost(tmp_path, mode, suffix):
    with pytest.raises(OutputError, match=r"\.png or \.webp"):
        media.save_image(picture().convert(mode), tmp_path / f"x{suffix}", METADATA)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", media.ALPHA_ENDINGS)
def test_transparency_is_kept(tmp_path, suffix):
    image = picture().convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    media.save_image(image, tmp_path / f"x{suffix}", METADATA)
    with Image.open(tmp_path / f"x{suffix}") as saved:
        assert np.array_equal(array(saved), array(image))


@pytest.mark.parametrize(("count", "names"), [(0, []), (1, ["a.b.png"]), (3, ["a.b-1.png", "a.b-2.png", "a.b-3.png"])])
def test_output_paths(tmp_path, count, names):
    assert media.output_paths(tmp_path / "a.b.png", count) == [tmp_path / name for name in names]


# Reading


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def bomb(width, height):
    """A PNG of some hundred bytes that says it is of this size."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(b"\0" * 10_000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(50_000, 50_000), (10_001, 10_000), (2**31 - 1, 2**31 - 1), (100_000_001, 1)])
def test_a_huge_picture_is_refused_from_its_header(tmp_path, size):
    path = tmp_path / "bomb.png"
    path.write_bytes(bomb(*size))
    assert path.stat().st_size < 200
    tracemalloc.start()
    try:
        with pytest.raises(InvalidParameterError, match=r"^image: got .*bomb"):
            media.open_image(path)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_nothing_is_decoded_of_a_huge_picture(tmp_path, monkeypatch):
    (tmp_path / "bomb.png").write_bytes(bomb(10_001, 10_000))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda image: pytest.fail("pixels are decoded"))
    with pytest.raises(InvalidParameterError, match="at most 100 megapixels, not 10001x10000"):
        media.open_image(tmp_path / "bomb.png")


def test_the_largest_picture_is_not_refused_for_its_size(tmp_path):
    (tmp_path / "large.png").write_bytes(bomb(10_000, 10_000))
    with pytest.raises(InvalidParameterError, match=r"readable PNG.*truncated"):
        media.open_image(tmp_path / "large.png")


GREY16 = np.linspace(0, 65535, 33 * 17).astype(np.uint16).reshape(17, 33)

MODES = {
    "palette": (lambda: picture().quantize(64), lambda image: array(image.convert("RGB"))),
    "palette with transparency": (
        lambda: picture().convert("RGBA").quantize(16),
        lambda image: array(image.convert("RGBA"))[:, :, :3],
    ),
    "grey": (lambda: picture().convert("L"), lambda image: array(image)[:, :, None].repeat(3, axis=2)),
    "grey with alpha": (lambda: picture().convert("LA"), lambda image: array(image)[:, :, :1].repeat(3, axis=2)),
    "1 bit": (lambda: picture().convert("1"), lambda image: array(image)[:, :, None].repeat(3, axis=2) * 255),
    "16 bit": (lambda: Image.fromarray(GREY16), lambda image: (GREY16 // 256)[:, :, None].repeat(3, axis=2)),
    "alpha": (lambda: picture().convert("RGBA"), lambda image: array(picture())),
}


@pytest.mark.parametrize(("make", "expected"), MODES.values(), ids=MODES.keys())
@pytest.mark.parametrize("from_file", [False, True])
def test_pictures_become_rgb(tmp_path, make, expected, from_file):
    image = make()
    image.save(tmp_path / "x.png")
    opened = media.open_image(tmp_path / "x.png" if from_file else image)
    assert (opened.mode, opened.size) == ("RGB", (33, 17))
    assert np.abs(array(opened) - expected(image)).max() <= 1


def test_cmyk(tmp_path):
    picture().convert("CMYK").save(tmp_path / "x.jpg", quality=100, subsampling=0)
    opened = media.open_image(str(tmp_path / "x.jpg"))
    assert opened.mode == "RGB"
    assert np.abs(array(opened) - array(picture())).mean() < 4


def test_rgba_keeps_its_alpha():
    image = picture().convert("RGBA")
    image.putalpha(7)
    assert media.open_image(image, mode="RGBA").getchannel("A").getextrema() == (7, 7)
    assert media.open_image(picture(), mode="RGBA").getchannel("A").getextrema() == (255, 255)


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_pictures_without_a_range_are_refused(dtype):
    """Pillow would cut their values at 255."""
    with pytest.raises(InvalidParameterError, match="8 or 16 bits"):
        media.open_image(Image.fromarray(np.ones((4, 4), dtype)))


@pytest.mark.parametrize(("mode", "expected"), [("RGBA", True), ("LA", True), ("RGB", False), ("L", False)])
def test_has_alpha(tmp_path, mode, expected):
    picture().convert(mode).save(tmp_path / "x.png")
    assert media.has_alpha(picture().convert(mode)) is media.has_alpha(tmp_path / "x.png") is expected


@pytest.mark.parametrize("turn", range(1, 9))
def test_exif_orientation(tmp_path, turn):
    """As Pillow's own transposition has it, for all eight."""
    ways = [None, None, "FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_270", "TRANSVERSE"]
    way = [*ways, "ROTATE_90"][turn]
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = turn
    picture().save(tmp_path / "x.png", exif=exif)
    expected = picture().transpose(Image.Transpose[way]) if way else picture()
    assert np.array_equal(array(media.open_image(tmp_path / "x.png")), array(expected))


def test_a_picture_that_pillow_has_opened_and_cannot_read(tmp_path):
    picture().save(tmp_path / "x.png")
    content = (tmp_path / "x.png").read_bytes()
    with pytest.raises(InvalidParameterError, match=r"^image: got 'a PIL image'"):
        media.open_image(Image.open(io.BytesIO(content[:-30])))


@pytest.mark.parametrize("source", ["missing.png", "folder", "a\0b", ""])
def test_what_is_no_file(tmp_path, source):
    (tmp_path / "folder").mkdir()
    with pytest.raises(InvalidParameterError, match="image_2: got"):
        media.open_image(tmp_path / source if source else "", "image_2")


def test_damaged_files_are_refused_or_read(tmp_path):
    """Random damage to each format ends in a picture or in our error, never in another."""
    rng, path = random.Random(0), tmp_path / "x"
    wholes = []
    for suffix in (".png", ".jpg", ".webp"):
        media.save_image(picture(), tmp_path / f"x{suffix}", METADATA)
        wholes.append((tmp_path / f"x{suffix}").read_bytes())
    refused = 0
    for number in range(600):
        content = bytearray(wholes[number % 3])
        for _ in range(rng.choice((1, 2, 5))):
            content[rng.randrange(min(len(content), rng.choice((60, 10_000))))] = rng.randrange(256)
        path.write_bytes(content[: rng.choice((len(content), rng.randrange(len(content))))])
        for read in (media.open_image, media.read_metadata):
            try:
                read(path)
            except InvalidParameterError as error:
                refused += 1
                assert "\n" not in str(error)
    assert 300 < refused < 1200


PARAMETERS = [None, b"", b"7", b"[]", b"not JSON", b"[" * 100_000, b"\xff\xfe"]


@pytest.mark.parametrize("text", PARAMETERS, ids=lambda text: str(text)[:12])
@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_parameters_of_other_programs(tmp_path, suffix, text):
    path = tmp_path / f"x{suffix}"
    if text is None:
        picture().save(path)
    elif suffix == ".png":
        header = struct.pack(">IIBBBBB", 1, 1, 8, 2, 0, 0, 0)
        path.write_bytes(
            b"\x89PNG\r\n\x1a\n"
            + chunk(b"IHDR", header)
            + chunk(b"tEXt", b"parameters\0" + text)
            + chunk(b"IDAT", zlib.compress(b"\0" * 4))
            + chunk(b"IEND", b"")
        )
    else:
        exif = Image.Exif()
        exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = text[:60_000]
        picture().save(path, exif=exif)
    with pytest.raises(InvalidParameterError, match=r"has none of Safelight's|a picture or video that Safelight made"):
        media.read_metadata(path)
