"""The corpus of bad inputs: each has its status and names its field, and harms nobody who comes after."""

from __future__ import annotations

import gzip
import json
import struct

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from safelight.families.flux.params import FluxKontextSamplingParams
from safelight.serving.limits import Limits
from safelight.serving.own_fields import image_fields
from tests.serving.http_server import PROMPT, assert_error, running
from tests.serving.stub_engine import EDIT_SCHEMA, IMAGE_TO_VIDEO_SCHEMA, VIDEO_SCHEMA
from tests.serving.wire import JSON, control
from tests.uploads import chunk, picture


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
