"""Input pictures: files and data URLs, judged from their headers before anything is decoded."""

from __future__ import annotations

import base64
import io
import struct
import textwrap
import urllib.parse
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from safelight.encoded import EncodedImage
from safelight.errors import InvalidParameterError
from safelight.serving.input_pictures import picture_bytes
from safelight.serving.limits import Limits
from tests.serving.form_parts import (
    EDITS,
    SEVERAL,
    png,
)
from tests.serving.http_server import assert_error, running
from tests.serving.stub_engine import EDIT_SCHEMA
from tests.uploads import chunk, decode_picture, picture


@pytest.fixture(scope="module")
def editor(tmp_path_factory):
    with running(tmp_path_factory.mktemp("edits"), SEVERAL) as server:
        yield server


ABOUT = st.sampled_from(
    [
        "",
        "image/png",
        "IMAGE/PNG",
        "image/svg+xml",
        "image/png;charset=utf-8",
        'image/png;name="a,b;c.png"',
        "image/png;name=a%2Cb.png;charset=US-ASCII",
        "application/octet-stream",
        ";charset=UTF-8",
    ]
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    about=ABOUT,
    scheme=st.sampled_from(["data:", "DATA:", "Data:"]),
    form=st.sampled_from([";base64", ";BASE64", ""]),
    width=st.sampled_from([None, 4, 60, 64, 76]),
    end=st.sampled_from(["\n", "\r\n", "\n\t", " ", "%0A", "%0D%0A", "%20"]),
    escaped=st.booleans(),
    padded=st.booleans(),
    kind=st.sampled_from(["PNG", "JPEG", "WEBP"]),
)
def test_data_urls(about, scheme, form, width, end, escaped, padded, kind):
    """RFC 2397, and what senders and browsers make of it: any parameters, line ends, escapes, case, no padding."""
    data = png(kind=kind)
    if form:
        text = base64.b64encode(data).decode()
        text = text if padded else text.rstrip("=")
        lines = [text] if width is None else textwrap.wrap(text, width)
        text = "".join(
            (urllib.parse.quote(line, safe="") if escaped else line) + end * (width is not None) for line in lines
        )
    else:
        text = urllib.parse.quote(data, safe="")
    assert picture_bytes(f"{scheme}{about}{form},{text}", "image", Limits()) == data


@pytest.mark.parametrize(
    "url",
    [
        "data:image/png;base64",
        "data:image/png;base64,A",
        "data:image/png;base64,@@@@",
        "data:image/png;base64,iVBO=Rw0",
        'data:image/png;name="x,AAAA',
        "data:" + ";a=b" * 1000 + ",AAAA",
        "data:," + "%41" * 1_000_001,
        "data:image/png;base64,\u00e9AAA",
    ],
    ids=lambda url: url[:40],
)
def test_broken_data_urls(url):
    with pytest.raises(InvalidParameterError) as caught:
        picture_bytes(url, "image", Limits())
    assert caught.value.param == "image" and len(str(caught.value)) < 300


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_plain_base64_is_named_for_what_it_is(editor, kind, wrapped):
    text = base64.b64encode(png(kind=kind)).decode()
    text = "\n".join(textwrap.wrap(text, 76)) if wrapped else text
    with editor.http() as http:
        answers = [http.post(EDITS, json={"prompt": "x", "image": text})]
        answers.append(http.post(EDITS, json={"prompt": "x", "images": [{"image_url": text}]}))
        answers.append(http.post(EDITS, files={"prompt": (None, "x"), "image": (None, text)}))
    for answer, name in zip(answers, ("image", "images", "image"), strict=True):
        message = assert_error(answer, 400, name)["message"]
        assert "base64" in message and ";base64, before it" in message and text[:20] not in message
        assert kind in message or kind == "GIF"


@pytest.mark.parametrize(
    "value", ["/etc/passwd", "https://example.org/a.png", "x" * 99, "a b" * 100, "\u00e9" * 200, ""]
)
def test_other_text_is_not_called_base64(value):
    with pytest.raises(InvalidParameterError, match="a URL or a path"):
        picture_bytes(value, "image", Limits())


@pytest.fixture(scope="module")
def edits(tmp_path_factory):
    with running(tmp_path_factory.mktemp("edits"), EDIT_SCHEMA) as server, server.http() as http:
        yield http


def png_of(width, height, data=b"", depth=8, color=2, extra=b""):
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def animation(frames, kind="GIF"):
    file = io.BytesIO()
    side = 1 if kind == "GIF" else 48
    first, *others = [Image.new("L", (side, side), 90 * index % 251) for index in range(frames)]
    first.save(file, kind, save_all=True, append_images=others)
    return file.getvalue()


def broken_crc():
    data = bytearray(picture())
    data[data.index(b"IDAT") - 4 + 8 + struct.unpack_from(">I", data, data.index(b"IDAT") - 4)[0]] ^= 1
    return bytes(data)


def broken_exif():
    return picture(kind="JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01\x03\0\xff\xff\xff\xff")


def many_scans():
    """A progressive JPEG whose last scan comes 200 times, which libjpeg decodes without complaint."""
    data = picture(kind="JPEG", progressive=True)
    last = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + last * 200 + data[-2:]


def jpeg_of(width, height):
    """A small JPEG whose header says that it is a large one."""
    data = picture(kind="JPEG")
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + struct.pack(">HH", height, width) + data[at + 4 :]


def jpeg_with(between):
    """A JPEG with something before its first segment."""
    data = picture(kind="JPEG")
    return data[:2] + between + data[2:]


def lossless_webp_of(width, height):
    bits = struct.pack("<I", (width - 1) | (height - 1) << 14)
    return b"RIFF" + struct.pack("<I", 30) + b"WEBPVP8L" + struct.pack("<I", 18) + b"\x2f" + bits + b"\0" * 13


BOMB = png_of(13_340, 13_340, zlib.compress(b"\0" * 20))


PICTURES = {
    "nothing": (b"", 400),
    "text": (b"hello, I am a PNG", 400),
    "SVG": (b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>', 400),
    "EPS": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", 400),
    "PDF": (b"%PDF-1.4\n", 400),
    "TIFF": (picture(kind="TIFF"), 400),
    "BMP": (picture(kind="BMP"), 400),
    "GIF of 10,000 frames": (animation(10_000), 400),
    "animated WebP": (animation(3, "WEBP"), 400),
    "signature alone": (b"\x89PNG\r\n\x1a\n", 400),
    "truncated PNG": (picture()[:-20], 400),
    "truncated JPEG": (picture(kind="JPEG")[:300], 400),
    "truncated WebP": (picture(kind="WEBP")[:-8], 400),
    "bad CRC": (broken_crc(), 400),
    "20000x20000": (png_of(20_000, 20_000), 400),
    "bomb": (BOMB, 400),
    "bomb in WebP": (lossless_webp_of(16_384, 16_384), 400),
    "9000x1": (picture(size=(9000, 1)), 400),
    "5001x5001": (picture(mode="1", size=(5001, 5001)), 400),
    "64 MB of text": (png_of(32, 48, extra=chunk(b"zTXt", b"a\0\0" + zlib.compress(b"x" * (64 << 20)))), 400),
    "many chunks": (png_of(32, 48, extra=chunk(b"tEXt", b"") * 100_000), 400),
    "many scans": (many_scans(), 400),
    "fill bytes": (jpeg_with(b"\xff" * 100_000), 400),
    "zeros between": (jpeg_with(b"\0" * 100_000), 400),
    "escapes between": (jpeg_with(b"\xff\0" * 100_000), 400),
    "junk between": (jpeg_with(b"x" * 100_000), 400),
    "many segments": (jpeg_with(b"\xff\xfe\0\2" * 100_000), 400),
    "many empty markers": (jpeg_with(b"\xff\x01" * 100_000), 400),
    "a segment without an end": (jpeg_with(b"\xff\xfe"), 400),
    "few of each": (jpeg_with((b"\xff" * 9 + b"\xff\xfe\xff\xfc" + b"a" * 0xFFFA) * 100), 200),
    "header twice": (png_of(32, 48, extra=chunk(b"IHDR", struct.pack(">IIBBBBB", 9999, 9999, 8, 2, 0, 0, 0))), 400),
    "no data": (png_of(32, 48), 400),
    "1x1": (picture(size=(1, 1)), 400),
    "8192x1": (picture(size=(8192, 1)), 400),
    "17 MiB": (b"\x89PNG\r\n\x1a\n" + b"\0" * (17 << 20), 413),
    "broken EXIF": (broken_exif(), 200),
    "CMYK": (picture(mode="CMYK", kind="JPEG"), 200),
    "16 bits": (picture(mode="I;16"), 200),
    "grey": (picture(mode="L"), 200),
    "grey with alpha": (picture(mode="LA"), 200),
    "palette with alpha": (picture(mode="P", transparency=0), 200),
    "1 bit": (picture(mode="1"), 200),
    "alpha": (picture(mode="RGBA"), 200),
    "WebP": (picture(kind="WEBP"), 200),
    "progressive JPEG": (picture(kind="JPEG", progressive=True), 200),
}


@pytest.mark.parametrize(("data", "status"), PICTURES.values(), ids=PICTURES)
def test_pictures(edits, data, status):
    answers = [edits.post("/v1/images/edits", data={"prompt": "x"}, files={"image": ("a.png", data, "image/png")})]
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    answers.append(edits.post("/v1/images/edits", json={"prompt": "x", "image": url}))
    for answer in answers:
        if status == 200:
            assert answer.status_code == 200, answer.text
        else:
            assert_error(answer, status, "image")
    sent = {"image": ("a", picture(), "image/gif")}
    assert edits.post("/v1/images/edits", data={"prompt": "x"}, files=sent).status_code == 200


def test_the_bomb_is_as_small_as_they_say():
    assert len(BOMB) < 118


HEADS = ["many scans", "fill bytes", "zeros between", "escapes between", "junk between", "many segments"]


@pytest.mark.parametrize("name", ["bomb", "bomb in WebP", "bad CRC", "animated WebP", "many chunks", *HEADS])
def test_headers_are_judged_before_pillow_sees_them(monkeypatch, name):
    monkeypatch.setattr(Image, "open", lambda *arguments, **options: pytest.fail("it was opened"))
    with pytest.raises(InvalidParameterError):
        decode_picture(PICTURES[name][0], "image", Limits())


@pytest.mark.parametrize(("width", "height"), [(20_000, 20_000), (9000, 1), (1, 9000), (5001, 5000), (65_535, 65_535)])
@pytest.mark.parametrize("of", [png_of, jpeg_of, lossless_webp_of])
def test_a_size_is_judged_before_anything_is_decoded(monkeypatch, of, width, height):
    """In every format, along each side and in all. Of a JPEG that is far too large Pillow reads no size."""
    monkeypatch.setattr(EncodedImage, "load", lambda image: pytest.fail("it was decoded"))
    if of is lossless_webp_of:
        width, height = min(width, 16_384), min(height, 16_384)
    says = "at most 8192 pixels along a side, and 25000000 in all"
    if of is jpeg_of and width * height > 2 * (Image.MAX_IMAGE_PIXELS or 0):
        says = "a damaged JPEG file"
    with pytest.raises(InvalidParameterError, match=says):
        decode_picture(of(width, height), "image", Limits())


@pytest.mark.parametrize(
    "value",
    [
        "/etc/passwd",
        "file:///etc/passwd",
        "https://example.org/a.png",
        "data:image/png;base64,@@@",
        "data:image/png;base64,AAA",
        "data:image/png,AAAA",
        "data:" + "x" * 1000,
        "iVBORw0KGgo=",
        "",
        3,
        {"path": "/etc/passwd"},
        {"image_url": "https://example.org/a.png"},
        {"file_id": "file_1"},
        [],
        [["data:image/png;base64,AAAA"]],
    ],
    ids=repr,
)
def test_what_is_no_picture(edits, value):
    assert_error(edits.post("/v1/images/edits", json={"prompt": "x", "image": value}), 400, "image")
    assert_error(edits.post("/v1/images/generations", json={"prompt": "x", "image": value}), 400, "image")
    if isinstance(value, str):
        files = {"prompt": (None, "x"), "image": (None, value)}
        assert_error(edits.post("/v1/images/edits", files=files), 400, "image")
