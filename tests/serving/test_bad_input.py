"""The corpus of bad inputs: each has its status and names its field, and harms nobody who comes after."""

from __future__ import annotations

import base64
import gzip
import io
import json
import struct
import zlib

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from safelight.encoded import EncodedImage
from safelight.errors import InvalidParameterError
from safelight.families.flux.params import FluxKontextSamplingParams
from safelight.serving.limits import Limits
from safelight.serving.own_fields import image_fields
from tests.serving.http_server import PROMPT, assert_error, running
from tests.serving.stub_engine import EDIT_SCHEMA, IMAGE_TO_VIDEO_SCHEMA, VIDEO_SCHEMA
from tests.uploads import decode_picture

JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    with running(tmp_path_factory.mktemp("images")) as server, server.http() as http:
        yield http


@pytest.fixture(scope="module")
def edits(tmp_path_factory):
    with running(tmp_path_factory.mktemp("edits"), EDIT_SCHEMA) as server, server.http() as http:
        yield http


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    limits = Limits(max_cost=100_000)
    with running(tmp_path_factory.mktemp("videos"), VIDEO_SCHEMA, limits=limits) as server, server.http() as http:
        yield http


def control(http):
    """A request that succeeds, and makes what it always makes."""
    answer = http.post("/v1/images/generations", json={"prompt": PROMPT, "seed": 1})
    assert answer.status_code == 200
    return answer.json()["data"][0]["b64_json"]


@pytest.fixture(scope="module")
def expected(images):
    return control(images)


def generate(images, expected, fields, status, param=None):
    answer = images.post("/v1/images/generations", content=json.dumps({"prompt": PROMPT, **fields}), headers=JSON)
    if status == 200:
        assert answer.status_code == 200, answer.text
    else:
        assert_error(answer, status, param)
    assert control(images) == expected


BODIES = {
    "empty": b"",
    "blank": b" \n",
    "null": b"null",
    "a list": b"[]",
    "a string": b'"prompt"',
    "truncated": b'{"prompt": "x"',
    "two values": b'{"prompt": "x"} {}',
    "200,000 nested": b"[" * 200_000,
    "50,000 nested": b'{"prompt": ' + b"[" * 50_000,
    "NaN": b'{"prompt": "x", "guidance_scale": NaN}',
    "-Infinity": b'{"prompt": "x", "guidance_scale": -Infinity}',
    "1e999": b'{"prompt": "x", "guidance_scale": 1e999}',
    "5,000 digits": b'{"prompt": "x", "seed": ' + b"1" * 5000 + b"}",
    "a long fraction": b'{"prompt": "x", "guidance_scale": 1.' + b"1" * 5_000_000 + b"}",
    "invalid UTF-8": b'{"prompt": "\xff\xfe"}',
    "overlong UTF-8": b'{"prompt": "\xc0\xaf"}',
    "a surrogate in UTF-8": b'{"prompt": "\xed\xa0\x80"}',
    "UTF-16": '{"prompt": "x"}'.encode("utf-16"),
    "a byte order mark": b'\xef\xbb\xbf{"prompt": "x"}',
    "a lone surrogate": b'{"prompt": "\\ud800"}',
    "a lone surrogate as a name": b'{"prompt": "x", "\\ud800": 1}',
    "a control character": b'{"prompt": "a\x01b"}',
    "many small items": b'{"prompt": "x", "sigmas": [' + b"0," * 1_000_000 + b"0]}",
    "many escapes": b'{"prompt": "' + b"\\u0041" * 1_000_000 + b'"}',
    "single quotes": b"{'prompt': 'x'}",
    "form": b"prompt=x",
}


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_bodies(images, expected, body):
    assert_error(images.post("/v1/images/generations", content=body, headers=JSON), 400)
    assert control(images) == expected


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b'{"prompt": "x", "prompt": "y"}', "prompt"),
        (b'{"prompt": "x", "n": 1, "n": 1}', "n"),
        (b'{"prompt": "x", "\\ud800": 1, "\\ud800": 1}', "\\ud800"),
    ],
)
def test_duplicate_keys(images, expected, body, param):
    assert_error(images.post("/v1/images/generations", content=body, headers=JSON), 400, param)
    assert control(images) == expected


@pytest.mark.parametrize(
    ("headers", "body", "status"),
    [
        ({"content-encoding": "gzip", **JSON}, gzip.compress(b"0" * 10_000_000), 415),
        ({"content-encoding": "br", **JSON}, b"{}", 415),
        ({"content-type": "text/plain"}, b'{"prompt": "x"}', 415),
        ({"content-type": "application/x-www-form-urlencoded"}, b"prompt=x", 415),
        ({"content-type": "multipart/form-data; boundary=x"}, b"--x--", 415),
        ({"content-type": "application/json; charset=utf-16"}, b'{"prompt": "x"}', 415),
        ({}, b'{"prompt": "x"}', 415),
        (JSON, b" " * (33 << 20), 413),
    ],
    ids=["gzip", "br", "text", "urlencoded", "multipart", "charset", "none", "33 MiB"],
)
def test_headers(images, expected, headers, body, status):
    assert_error(images.post("/v1/images/generations", content=body, headers=headers), status)
    assert control(images) == expected


def test_a_body_in_chunks_is_too_large_as_soon_as_it_is(images, expected):
    chunks = (b" " * (1 << 20) for _ in range(40))
    assert_error(images.post("/v1/images/generations", content=chunks, headers=JSON), 413)
    assert control(images) == expected


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/images/generations", 405),
        ("PUT", "/v1/videos", 405),
        ("POST", "/livez", 405),
        ("GET", "/index.html", 404),
        ("GET", "/v1/videos%2f", 404),
        ("GET", "/docs", 404),
        ("GET", "/v1/videos/%2e%2e", 404),
        ("GET", "/v1/videos/..%2f..%2fetc%2fpasswd", 404),
        ("GET", "/v1/videos/%00", 404),
        ("GET", "/v1/videos/video_%ff", 404),
        ("GET", "/v1/jobs/image_0/events", 404),
        ("GET", "/v1/jobs/image_0/content", 404),
        ("DELETE", "/v1/jobs/image_0", 404),
    ],
)
def test_paths(images, expected, method, path, status):
    assert_error(images.request(method, path), status)
    assert control(images) == expected


@pytest.mark.parametrize(
    "model", ["..%2f..%2fetc", "org%2Ftiny%2F", "%00", "org/tiny/schema/schema", "x" * 5000, "\u202e"]
)
def test_models_that_are_not_served(images, model):
    error = assert_error(images.get(f"/v1/models/{model}"), 404, "model")
    assert error["code"] == "model_not_found"


GENERATIONS = {
    "no prompt": ({"prompt": None}, 400, "prompt"),
    "blank": ({"prompt": " \n\u3000"}, 400, "prompt"),
    "8,193 characters": ({"prompt": "x" * 8193}, 400, "prompt"),
    "8,192 characters": ({"prompt": "x" * 8192}, 200, None),
    "NUL": ({"prompt": "a\0b"}, 400, "prompt"),
    "NUL in another text": ({"negative_prompt": "a\0b"}, 400, "negative_prompt"),
    "a list of prompts": ({"prompt": ["a", "b"]}, 400, "prompt"),
    "a number as prompt": ({"prompt": 3}, 400, "prompt"),
    "a template": ({"prompt": "{{x}} ${y} %s%n <|im_start|>system"}, 200, None),
    "emoji": ({"prompt": "🧑‍🎨"}, 200, None),
    **{
        f"size {size!r}": ({"size": size}, 400, "size")
        for size in [
            "0x0",
            "-64x64",
            "64",
            "99999x99999",
            "65x65",
            "\uff16\uff14x\uff16\uff14",
            "64X64",
            " 64x64",
            "64x64x64",
            "x",
            "",
            64,
        ]
    },
    "size and height": ({"size": "64x64", "height": 64}, 400, "size"),
    "height": ({"height": 65}, 400, "height"),
    **{f"n {n!r}": ({"n": n}, 400, "n") for n in [0, -1, 10**7, 11, True, "2", 2.5, [], {}]},
    "n in 900 lists": ({"n": json.loads("[" * 900 + "]" * 900)}, 400, "n"),
    "n by its other name": ({"num_images_per_prompt": 11}, 400, "num_images_per_prompt"),
    "n twice": ({"n": 2, "num_images_per_prompt": 2}, 400, "num_images_per_prompt"),
    **{f"steps {n!r}": ({"num_inference_steps": n}, 400, "num_inference_steps") for n in [0, 10**9, -1, "4", 1.5]},
    **{f"guidance {n!r}": ({"guidance_scale": n}, 400, "guidance_scale") for n in [-1, 1e30, 10**39, "3", True]},
    **{f"seed {n!r}": ({"seed": n}, 400, "seed") for n in [-1, 2**64, 1.5, "1", 10**39]},
    "the last seeds": ({"seed": 2**64 - 1, "n": 2}, 400, "seed"),
    **{
        f"format {f!r}": ({"output_format": f}, 400, "output_format") for f in ["exe", "../png", "gif", "svg", "PNG", 1]
    },
    **{f"quality {q!r}": ({"quality": q}, 400, "quality") for q in ["HD", "best", 1]},
    "quality and steps": ({"quality": "low", "num_inference_steps": 4}, 400, "quality"),
    "compression": ({"output_format": "jpeg", "output_compression": 101}, 400, "output_compression"),
    "compression of png": ({"output_compression": 50}, 400, "output_compression"),
    "background": ({"background": "blue"}, 400, "background"),
    "response format": ({"response_format": "file"}, 400, "response_format"),
    "a stream of addresses": ({"stream": True, "response_format": "url"}, 400, "response_format"),
    "stream as text": ({"stream": "true"}, 400, "stream"),
    "previews": ({"stream": True, "partial_images": 2}, 400, "partial_images"),
    "too many previews": ({"partial_images": 4}, 400, "partial_images"),
    "model": ({"model": "../../secret"}, 404, "model"),
    "model as a number": ({"model": 3}, 400, "model"),
    "an unknown field": ({"stepps": 3}, 400, "stepps"),
    "an empty name": ({"": 3}, 400, ""),
    "form of the result": ({"output_type": "latent"}, 400, "output_type"),
    "Diffusers' own": ({"generator": 1}, 400, "generator"),
    "frames": ({"num_frames": 9}, 400, "num_frames"),
    "mask": ({"mask": "data:image/png;base64,AA=="}, 400, "mask"),
    "sigmas": ({"sigmas": [1.0, None]}, 400, "sigmas"),
    "no sigmas": ({"sigmas": []}, 400, "sigmas"),
    "sigmas and steps": ({"sigmas": [1.0, 0.5], "num_inference_steps": 3}, 400, "num_inference_steps"),
    "an image": ({"image": "data:image/png;base64,AA=="}, 400, "image"),
    "too much work": ({"size": "16384x16384", "n": 10, "num_inference_steps": 1000}, 400, "size"),
    "too many steps for it": ({"size": "4096x4096", "num_inference_steps": 1000}, 400, "size"),
}


@pytest.mark.parametrize(("fields", "status", "param"), GENERATIONS.values(), ids=GENERATIONS)
def test_generations(images, expected, fields, status, param):
    generate(images, expected, fields, status, param)


def test_answers_say_what_to_do(images):
    said = {}
    asked = {"size": {"size": "65x65"}, "unknown": {"stepps": "3"}, "form": {"output_type": "pt"}}
    for name, fields in asked.items():
        said[name] = images.post("/v1/images/generations", json={"prompt": PROMPT, **fields}).json()["error"]["message"]
    assert "multiple of 16" in said["size"] and "'65x65'" in said["size"]
    assert "num_inference_steps" in said["unknown"] and "use output_format" in said["form"]


# pictures


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_of(width, height, data=b"", depth=8, color=2, extra=b""):
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def picture(mode="RGB", size=(32, 48), kind="PNG", **options):
    file = io.BytesIO()
    Image.new(mode, size).save(file, kind, **options)
    return file.getvalue()


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


def test_no_picture_at_all(edits):
    for fields in ({}, {"image": None}):
        assert_error(edits.post("/v1/images/edits", json={"prompt": "x", **fields}), 400, "image")


def test_nine_images_and_seventeen(edits):
    for count in (2, 9, 17):
        files = [("image[]", ("a", picture(), "image/png"))] * count
        assert_error(edits.post("/v1/images/edits", data={"prompt": "x"}, files=files), 400, "image")


def test_edits_of_a_model_without_pictures(images, expected):
    files = {"image": ("a", picture(), "image/png")}
    assert_error(images.post("/v1/images/edits", data={"prompt": "x"}, files=files), 400, "image")
    assert control(images) == expected


# forms

BOUNDARY = "b0undary"


def form(*parts, end=True):
    body = b""
    for disposition, content in parts:
        body += b"--b0undary\r\nContent-Disposition: form-data; " + disposition + b"\r\n\r\n" + content + b"\r\n"
    return body + (b"--b0undary--\r\n" if end else b"")


IMAGE = (b'name="image"; filename="a"', picture())
FORMS = {
    "1,001 parts": (form(*[(b'name="a[]"', b"x")] * 1001), None),
    "129 parts": (form(*[(b'name="a[]"', b"x")] * 129), None),
    "no end": (form(IMAGE, (b'name="prompt"', b"x"), end=False), None),
    "no parts": (b"--b0undary--\r\n", "prompt"),
    "another boundary": (b"--other--\r\n", None),
    "empty": (b"", None),
    "junk": (b"\0" * 100_000, None),
    "no name": (form(IMAGE, (b'filename="x"', b"x")), ""),
    "NUL in a name": (form(IMAGE, (b'name="a\0b"', b"x")), "a\0b"),
    "unclosed bracket": (form(IMAGE, (b'name="a[b"', b"x")), "a[b"),
    "deep brackets": (form(IMAGE, (b'name="a' + b"[b]" * 50 + b'"', b"x")), ("a" + "[b]" * 50)[:100]),
    "a prompt twice": (form(IMAGE, (b'name="prompt"', b"x"), (b'name="prompt"', b"y")), "prompt"),
    "an image twice": (form(IMAGE, IMAGE, (b'name="prompt"', b"x")), "image"),
    "an image in two forms": (form(IMAGE, (b'name="image[]"; filename="a"', picture())), "image"),
    "a text in two forms": (form((b'name="prompt"', b"x"), (b'name="prompt[a]"', b"y")), "prompt"),
    "a list as a text": (form(IMAGE, (b'name="prompt[]"', b"x")), "prompt"),
    "a file as a text": (form(IMAGE, (b'name="prompt"; filename="a"', b"x")), "prompt"),
    "a text as an image": (form((b'name="image"', b"/etc/passwd"), (b'name="prompt"', b"x")), "image"),
    "text in another encoding": (form(IMAGE, (b'name="prompt"', b"\xff")), "prompt"),
    "a number that is none": (form(IMAGE, (b'name="prompt"', b"x"), (b'name="n"', b"two")), "n"),
    "an empty number": (form(IMAGE, (b'name="prompt"', b"x"), (b'name="n"', b"")), "n"),
    "a number of full width": (form(IMAGE, (b'name="prompt"', b"x"), (b'name="n"', "\uff12".encode())), "n"),
    "a huge number": (form(IMAGE, (b'name="prompt"', b"x"), (b'name="seed"', b"9" * 5000)), "seed"),
    "nan": (form(IMAGE, (b'name="prompt"', b"x"), (b'name="guidance_scale"', b"nan")), "guidance_scale"),
    "1e999": (form(IMAGE, (b'name="prompt"', b"x"), (b'name="guidance_scale"', b"1e999")), "guidance_scale"),
    "a boolean that is none": (form(IMAGE, (b'name="prompt"', b"x"), (b'name="stream"', b"yes")), "stream"),
    "long headers": (form((b'name="' + b"x" * 100_000 + b'"', b"x")), None),
}


@pytest.mark.parametrize(("body", "param"), FORMS.values(), ids=FORMS)
def test_forms(edits, body, param):
    headers = {"content-type": f"multipart/form-data; boundary={BOUNDARY}"}
    error = assert_error(edits.post("/v1/images/edits", content=body, headers=headers), 400, param)
    assert len(error["message"]) < 1000
    good = form(IMAGE, (b'name="prompt"', b"x"), (b'name="n"', b"2"), (b'name="guidance_scale"', b"2.5e0"))
    assert edits.post("/v1/images/edits", content=good, headers=headers).status_code == 200


@pytest.mark.parametrize("suffix", ["", "; boundary=", "; boundary=" + "x" * 5000])
def test_a_form_without_a_boundary(edits, suffix):
    headers = {"content-type": "multipart/form-data" + suffix}
    assert_error(edits.post("/v1/images/edits", content=b"--x--", headers=headers), 400)


@pytest.mark.parametrize("name", ["../../x", "a\0b", "/etc/passwd", "x" * 3000, "%2e%2e", "", "ü"])
def test_a_files_name_is_not_used(edits, name):
    body = form((b'name="image"; filename="' + name.encode() + b'"', picture()), (b'name="prompt"', b"x"))
    headers = {"content-type": f"multipart/form-data; boundary={BOUNDARY}"}
    assert edits.post("/v1/images/edits", content=body, headers=headers).status_code == 200


# videos

VIDEOS = {
    **{
        f"seconds {s!r}": ({"seconds": s}, "seconds") for s in ["abc", "0", 0, 10**9, "1e9", -1, "", True, "\uff14", []]
    },
    "seconds and frames": ({"seconds": 1, "num_frames": 9}, "seconds"),
    "frames": ({"num_frames": 10}, "num_frames"),
    "too long for it": ({"num_frames": 100_001}, "num_frames"),
    "fps": ({"fps": 0}, "fps"),
    "size": ({"size": "33x32"}, "size"),
    "n": ({"n": 2}, "n"),
    "together too much": ({"size": "96x64", "num_frames": 2401}, "num_frames"),
    "far too long": ({"seconds": 3600, "fps": 240}, "seconds"),
    "a path": ({"input_reference": "/etc/passwd"}, "input_reference"),
    "an unknown field": ({"stream": True}, "stream"),
}


@pytest.mark.parametrize(("fields", "param"), VIDEOS.values(), ids=VIDEOS)
def test_videos(videos, fields, param):
    error = assert_error(videos.post("/v1/videos", json={"prompt": PROMPT, **fields}), 400, param)
    if param == "num_frames" and fields == {"num_frames": 10}:
        assert "4k+1" in error["message"] and "9 and 13" in error["message"]
    if fields.get("num_frames") == 2401:
        assert "at most 100,000" in error["message"]
    assert videos.post("/v1/videos", json={"prompt": PROMPT}).status_code == 200


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("limit=0", "limit"),
        ("limit=101", "limit"),
        ("limit=x", "limit"),
        ("limit=%EF%BC%91", "limit"),
        ("limit=" + "9" * 5000, "limit"),
        ("order=up", "order"),
        ("after=video_0", "after"),
        ("page=2", "page"),
    ],
)
def test_lists(videos, query, param):
    assert_error(videos.get(f"/v1/videos?{query}"), 400, param)


def test_pictures_and_videos_have_their_own_routes(images, videos):
    assert "/v1/videos" in assert_error(videos.post("/v1/images/generations", json={"prompt": "x"}), 400)["message"]
    assert "/v1/images" in assert_error(images.post("/v1/videos", json={"prompt": "x"}), 400)["message"]


def test_a_refused_picture_is_not_shown_as_python_does(tmp_path):
    with running(tmp_path, IMAGE_TO_VIDEO_SCHEMA) as server, server.http() as http:
        files = {name: ("a", picture(), "image/png") for name in ("image", "last_image")}
        answer = http.post("/v1/videos", data={"prompt": "x", "num_frames": "1"}, files=files)
        assert "an image" in assert_error(answer, 400, "last_image")["message"]
        files["last_image"] = ("a", b"no", "image/png")
        assert_error(http.post("/v1/videos", data={"prompt": "x"}, files=files), 400, "last_image")
        several = [("last_image[]", ("a", picture(), "image/png"))] * 2
        assert_error(http.post("/v1/videos", data={"prompt": "x"}, files=several), 400, "last_image")


SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.sampled_from([2**64, 1e308])
)
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner))
NAMES = st.sampled_from([*image_fields(Limits()), *FluxKontextSamplingParams.options(), "mask"])


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(fields=st.dictionaries(NAMES | st.text(max_size=10), VALUES, max_size=4))
def test_whatever_fields_there_are_it_is_no_failure_of_ours(images, edits, fields):
    for http, path in ((images, "/v1/images/generations"), (edits, "/v1/images/edits")):
        answer = http.post(path, content=json.dumps({"prompt": "x", "size": "64x64", **fields}), headers=JSON)
        assert answer.status_code in (200, 400, 404), (fields, answer.text)


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_however_a_picture_is_damaged_it_is_no_failure_of_ours(edits, data):
    kind = data.draw(st.sampled_from(["PNG", "JPEG", "WEBP"]))
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "x" * 20
    damaged = bytearray(picture(kind=kind, exif=exif))
    for place in data.draw(st.lists(st.integers(0, len(damaged) - 1), max_size=4)):
        damaged[place] = data.draw(st.integers(0, 255))
    if kind == "PNG" and data.draw(st.booleans()):
        damaged = bytearray(with_right_checksums(bytes(damaged)))
    files = {"image": ("a", bytes(damaged[: data.draw(st.integers(0, len(damaged)))]), "image/png")}
    answer = edits.post("/v1/images/edits", data={"prompt": "x", "num_inference_steps": "1"}, files=files)
    assert answer.status_code in (200, 400), answer.text


def with_right_checksums(data):
    """Return a damaged PNG whose checksums are right, so that more than them is tried."""
    made, at = data[:8], 8
    while at + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, at)
        made += chunk(data[at + 4 : at + 8], data[at + 8 : at + 8 + min(length, len(data))])
        at += 12 + length
    return made
