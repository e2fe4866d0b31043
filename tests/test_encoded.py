"""Pictures are files until their pixels are needed, and what their EXIF says beside the orientation is not read."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from safelight.encoded import LEAST_KEPT, Decoded, EncodedImage
from safelight.media import open_image
from safelight.runtime.messages import Pictured, array_to_image, described_image, image_to_array
from safelight.serving.limits import Limits
from tests.uploads import decode_picture

FORMATS = ("JPEG", "PNG", "WEBP")
SOFTWARE, SUB_IFD, ORIENTATION = 0x0131, 0x8769, 0x0112
ENTRIES: dict[str, tuple[int, int, int, bytes]] = {
    "text that is a number": (SOFTWARE, 4, 1, struct.pack("<I", 7)),
    "text that is a fraction": (SOFTWARE, 5, 1, struct.pack("<I", 200)),
    "text that is a float": (SOFTWARE, 12, 1, struct.pack("<I", 200)),
    "a number that is text": (0x0100, 2, 4, b"abc\0"),
    "a fraction that is bytes": (0x011A, 7, 4, b"\xff\xfe\xfd\xfc"),
    "a folder that is text": (SUB_IFD, 2, 4, b"abc\0"),
    "a folder that is nowhere": (SUB_IFD, 4, 1, struct.pack("<I", 1 << 30)),
    "an unknown type": (SOFTWARE, 99, 1, struct.pack("<I", 1)),
    "more values than there are": (SOFTWARE, 4, 1 << 30, struct.pack("<I", 8)),
}


def exif(orientation: bytes, entry: tuple[int, int, int, bytes] | None = None) -> bytes:
    """Return EXIF of one folder: an entry, and the orientation, given as its type, count and value."""
    entries = [struct.pack("<H", ORIENTATION) + orientation]
    if entry is not None:
        entries.append(struct.pack("<HHI", *entry[:3]) + entry[3])
    folder = (
        struct.pack("<H", len(entries)) + b"".join(sorted(entries, key=lambda each: tag_of(bytes(each)))) + bytes(4)
    )
    return b"Exif\0\0II*\0" + struct.pack("<I", 8) + folder + bytes(200)


def tag_of(entry: bytes) -> int:
    return int.from_bytes(entry[:2], "little")


def turned(number: int) -> bytes:
    return struct.pack("<HIHH", 3, 1, number, 0)


def picture(fmt: str, orientation: bytes, entry: tuple[int, int, int, bytes] | None = None) -> bytes:
    """Return the file of a picture of four unlike quarters."""
    pixels = np.zeros((24, 40, 3), np.uint8)
    pixels[:12, :20], pixels[:12, 20:], pixels[12:, :20] = (250, 0, 0), (0, 250, 0), (0, 0, 250)
    settings: dict[str, dict[str, int]] = {
        "WEBP": {"lossless": 1},
        "JPEG": {"quality": 100, "subsampling": 0},
        "PNG": {},
    }
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, fmt, exif=exif(orientation, entry), **settings[fmt])
    return file.getvalue()


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("number", range(1, 9))
def test_a_picture_is_turned_as_its_orientation_says(fmt, number):
    data = picture(fmt, turned(number))
    found = decode_picture(data, "image", Limits()).converted("RGB")
    with Image.open(io.BytesIO(data)) as image:
        expected = ImageOps.exif_transpose(image).convert("RGB")
    assert found.size == expected.size
    assert np.array_equal(np.asarray(found), np.asarray(expected))


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("name", ENTRIES)
def test_whatever_else_the_exif_says_does_not_matter(fmt, name):
    data = picture(fmt, turned(6), ENTRIES[name])
    plain = np.asarray(open_image(decode_picture(picture(fmt, turned(6)), "image", Limits())))
    found = open_image(decode_picture(data, "image", Limits()))
    assert isinstance(found, EncodedImage) and found.size == (24, 40)
    assert np.array_equal(np.asarray(found), plain)


BROKEN = {
    "no TIFF": b"Exif\0\0XX*\0junk",
    "nothing": b"Exif\0\0",
    "half a header": b"Exif\0\0II",
    "a header alone": exif(turned(6))[:14],
    "half an entry": exif(turned(6))[:22],
    "a folder far away": b"Exif\0\0II*\0" + struct.pack("<I", 1 << 31),
    "a folder that is its header": b"Exif\0\0MM\0*" + bytes(4),
    "a large TIFF cut short": b"Exif\0\0II+\0\x08\0\0\0" + bytes(8),
}


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("name", BROKEN)
def test_an_exif_that_is_none_turns_nothing(fmt, name):
    """Of some Pillow raises what is of no error's kind."""
    file = io.BytesIO()
    Image.new("RGB", (40, 24), "red").save(file, fmt, exif=BROKEN[name])
    found = decode_picture(file.getvalue(), "image", Limits())
    assert found.size == np.asarray(open_image(found)).shape[1::-1] == (40, 24)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("orientation", [
    struct.pack("<HI", 2, 4) + b"abc\0", struct.pack("<HII", 5, 1, 200), struct.pack("<HI", 7, 4) + b"\6\0\0\0",
    struct.pack("<HIHH", 3, 2, 6, 6), turned(0), turned(9), struct.pack("<HII", 12, 1, 200),
    struct.pack("<HII", 4, 1 << 30, 8),
])  # fmt: skip
def test_an_orientation_that_is_none_turns_nothing(fmt, orientation):
    found = open_image(decode_picture(picture(fmt, orientation), "image", Limits()))
    assert np.asarray(found).shape[1::-1] == found.size


def test_a_file_crosses_the_socket_as_it_came():
    data = picture("PNG", turned(6))
    image = EncodedImage.read(data, FORMATS).converted("RGBA")
    described = described_image("image", (), image)
    other = array_to_image(image_to_array(image).tobytes(), described)
    assert described == Pictured("image", (), "RGBA", 24, 40, "PNG") and image_to_array(image).tobytes() == data
    assert np.array_equal(np.asarray(other), np.asarray(image))


def test_pixels_are_let_go_and_decoded_again():
    kept = Decoded(most=0)
    images = [EncodedImage.read(picture("PNG", turned(1)), FORMATS) for _ in range(LEAST_KEPT + 2)]
    first = np.asarray(images[0]).copy()
    for image in images:
        image.load()
        kept.keep(image)
    assert [image._im is not None for image in images] == [False] * 2 + [True] * LEAST_KEPT
    assert np.array_equal(np.asarray(images[0]), first)


def test_pictures_that_wait_take_as_much_as_their_files():
    """Sixteen of 25 megapixels, tried, kept and sent on: 1.6 GB if they were decoded; and what one takes goes back."""
    script = """
        import io
        from PIL import Image
        from safelight.runtime.messages import image_to_array
        from safelight.serving.limits import Limits
        from tests.uploads import decode_picture
        def kib(name): return int(open("/proc/self/status").read().partition(name + ":")[2].split()[0])
        def file(kind):
            made = io.BytesIO()
            Image.new("RGB", (5000, 5000), (9, 200, 30)).save(made, kind, exif=exif)
            return made.getvalue()
        exif = Image.Exif(); exif[0x0112] = 6
        files = [file(kind) for kind in ("JPEG", "PNG")]
        decode_picture(files[0], "image", Limits())
        open("/proc/self/clear_refs", "w").write("5")
        rest = kib("VmRSS")
        kept = [decode_picture(files[number % 2], "image", Limits()) for number in range(16)]
        sent = [image_to_array(image) for image in kept]
        print(kib("VmHWM") - rest, kib("VmRSS") - rest)
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=60, cwd=Path(__file__).parents[1]
    )
    peak, after = map(int, done.stdout.split())
    assert peak < 300 * 1024 and after < 20 * 1024, (peak, after)
