"""Forms as clients write them, and what is refused of them."""

from __future__ import annotations

import base64
import io
import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from safelight.serving.http import forms
from safelight.serving.http.forms import Upload, parse_form
from safelight.serving.http.spool import Stored
from safelight.serving.limits import Limits
from safelight.serving.own_fields import VIDEO_FIELDS, image_fields
from tests.serving.form_parts import (
    EDITS,
    PICTURE,
    SEVERAL,
    data_url,
    disposed,
    form,
    last_params,
    part,
    png,
)
from tests.serving.http.spools import spooled
from tests.serving.http_server import assert_error, running
from tests.serving.stub_engine import EDIT_SCHEMA, IMAGE_TO_VIDEO_SCHEMA


@pytest.fixture(scope="module")
def editor(tmp_path_factory):
    with running(tmp_path_factory.mktemp("edits"), SEVERAL) as server:
        yield server


FILE = "Content-Type: application/octet-stream"


CLIENTS = {
    "curl -F image=@a.png": [
        part(disposed('name="prompt"'), b"x"),
        part(disposed('name="n"'), b"2"),
        part([disposed('name="image"; filename="a.png"'), "Content-Type: image/png"], PICTURE),
    ],
    "curl -F 'image=<a.png;type=image/png'": [
        part([disposed('name="image"'), "Content-Type: image/png"], PICTURE),
        part(disposed('name="prompt"'), b"x"),
        part(disposed('name="n"'), b"2"),
    ],
    "a browser, with a file that was not chosen": [
        part(disposed('name="prompt"'), b"x"),
        part(disposed('name="n"'), b"2"),
        part([disposed('name="image"; filename="\u00fc %22a%22.png"'), "Content-Type: image/png"], PICTURE),
        part([disposed('name="mask"; filename=""'), FILE], b""),
    ],
    "Node, with a file that was not chosen": [
        part(disposed('name="prompt"'), b"x"),
        part(disposed('name="n"'), b"2"),
        part([disposed('name="image"; filename="blob"'), "Content-Type: image/png"], PICTURE),
        part([disposed('name="mask"'), FILE], b""),
    ],
    "Java": [
        part(
            [disposed('name="prompt"'), "Content-Type: text/plain; charset=UTF-8", "Content-Transfer-Encoding: 8bit"],
            b"x",
        ),
        part([disposed('name="n"'), "Content-Type: text/plain; charset=US-ASCII"], b"2"),
        part(
            [
                disposed('name="image"; filename="a.png"'),
                "Content-Type: image/png",
                "Content-Transfer-Encoding: binary",
            ],
            PICTURE,
        ),
    ],
    "Spring": [
        part([disposed('name="prompt"'), "Content-Type: text/plain;charset=UTF-8", "Content-Length: 1"], b"x"),
        part([disposed('name="n"'), "Content-Type: application/json"], b"2"),
        part([disposed('name="image"; filename="a.png"'), "Content-Type: image/png", "Content-Length: 9"], PICTURE),
    ],
    ".NET": [
        part(["Content-Type: text/plain; charset=utf-8", disposed("name=prompt")], b"x"),
        part(["Content-Type: text/plain; charset=utf-8", disposed("name=n")], b"2"),
        part([disposed("name=image; filename=a.png; filename*=utf-8''a.png")], PICTURE),
    ],
    "Dart": [
        part('content-disposition: form-data; name="prompt"', b"x"),
        part('content-disposition: form-data; name="n"', b"2"),
        part(
            [
                "content-type: application/octet-stream",
                'content-disposition: form-data; name="image"; filename="a.png"',
            ],
            PICTURE,
        ),
    ],
    "a file whose name is extended alone": [
        part(disposed('name="prompt"'), b"x"),
        part(disposed('name="n"'), b"2"),
        part([disposed("name=\"image\"; filename*=utf-8''%C3%BC.png"), "Content-Type: image/png"], PICTURE),
    ],
    "bytes with neither name nor type": [
        part(disposed('name="prompt"'), b"x"),
        part(disposed('name="n"'), b"2"),
        part(disposed('name="image"'), PICTURE),
    ],
    "bytes that are called text": [
        part(disposed('name="prompt"'), b"x"),
        part(disposed('name="n"'), b"2"),
        part([disposed('name="image"'), "Content-Type: text/plain"], PICTURE),
    ],
    "a data URL as text": [
        part(disposed('name="prompt"'), b"x"),
        part(disposed('name="n"'), b"2"),
        part(disposed('name="image"'), data_url(PICTURE).encode()),
    ],
    "brackets": [
        part(disposed('name="prompt"'), b"x"),
        part(disposed('name="n"'), b"2"),
        part([disposed('name="image[]"; filename="a.png"'), "Content-Type: image/png"], PICTURE),
    ],
    "images in brackets, without file names": [
        part(disposed('name="prompt"'), b"x"),
        part(disposed('name="n"'), b"2"),
        part([disposed('name="images[]"'), "Content-Type: image/png"], PICTURE),
    ],
}


BOUNDARIES = {
    "plain": ("------------------------d74496d66958873e", "boundary=------------------------d74496d66958873e"),
    "quoted": ("=_Part_1_(7.3):?", 'boundary="=_Part_1_(7.3):?"; charset=utf-8'),
    "webkit": (
        "----WebKitFormBoundary7MA4YWxkTrZu0gW",
        "charset=UTF-8; boundary=----WebKitFormBoundary7MA4YWxkTrZu0gW",
    ),
}


@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("parts", CLIENTS.values(), ids=CLIENTS)
def test_forms_of_clients(editor, parts, boundary):
    mark, announced = BOUNDARIES[boundary]
    kind = "Multipart/Form-Data" if boundary == "quoted" else "multipart/form-data"
    headers = {"content-type": f"{kind}; {announced}"}
    with editor.http() as http:
        for framed in (form(parts, mark), form(parts, mark, begin=b"\r\n"), form(parts, mark, end=b"")):
            answer = http.post(EDITS, content=framed, headers=headers)
            assert answer.status_code == 200, answer.text
            params = last_params(editor)
            assert (params.prompt, params.n, [image.size for image in params.image]) == ("x", 2, [(32, 48)])


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("name", ["image", "image[]", "images", "images[]"])
@pytest.mark.parametrize("rest", ['; filename="a.png"', ""])
def test_an_image_comes_twice(editor, name, count, rest):
    """In their order."""
    sizes = [(32 + 16 * index, 48) for index in range(count)]
    parts = [part([disposed(f'name="{name}"{rest}'), "Content-Type: image/png"], png(*size)) for size in sizes]
    body = form([*parts, part(disposed('name="prompt"'), b"x")], "b")
    with editor.http() as http:
        answer = http.post(EDITS, content=body, headers={"content-type": "multipart/form-data; boundary=b"})
        assert answer.status_code == 200, answer.text
    assert [image.size for image in last_params(editor).image] == sizes


def test_a_list_of_numbers_comes_as_parts_of_one_name(editor):
    with editor.http() as http:
        for name in ("sigmas", "sigmas[]"):
            parts = [part(disposed(f'name="{name}"'), value) for value in (b"1", b"0.5", b"25e-2")]
            parts += [part(disposed('name="prompt"'), b"x"), part(disposed('name="image"'), PICTURE)]
            headers = {"content-type": "multipart/form-data; boundary=b"}
            answer = http.post(EDITS, content=form(parts, "b"), headers=headers)
            assert answer.status_code == 200, answer.text
            assert last_params(editor).set_fields()["sigmas"] == (1.0, 0.5, 0.25)


@pytest.mark.parametrize("schema", [SEVERAL, IMAGE_TO_VIDEO_SCHEMA], ids=["edits", "videos"])
def test_nothing_else_may_come_twice(tmp_path, schema):
    path = "/v1/videos" if schema.task.makes_video else EDITS
    own = VIDEO_FIELDS if schema.task.makes_video else image_fields(Limits())
    options, lists = {**schema.options(), **own}, ("image", "images", "numbers", "integers")
    scalars = [name for name, option in options.items() if option.kind not in lists and name != "output_type"]
    with running(tmp_path, schema) as server, server.http() as http:
        for name in scalars:
            parts = [part(disposed(f'name="{name}"'), b"1")] * 2 + [part(disposed('name="image"'), PICTURE)]
            headers = {"content-type": "multipart/form-data; boundary=b"}
            error = assert_error(http.post(path, content=form(parts, "b"), headers=headers), 400, name)
            assert error["message"] == f"{name}: is given twice"


@pytest.mark.parametrize("coding", ["base64", "quoted-printable", "gzip"])
def test_a_part_in_another_coding_is_refused_by_name(editor, coding):
    parts = [part([disposed('name="image"'), f"Content-Transfer-Encoding: {coding}"], base64.b64encode(PICTURE))]
    with editor.http() as http:
        headers = {"content-type": "multipart/form-data; boundary=b"}
        error = assert_error(http.post(EDITS, content=form(parts, "b"), headers=headers), 400, "image")
    assert "content-transfer-encoding" in error["message"]


def test_parts_in_a_part_are_told_how_to_come(editor):
    """As curl writes `-F image=@a.png,b.png`."""
    parts = [part([disposed('name="image"'), "Content-Type: multipart/mixed; boundary=c"], form([PICTURE] * 2, "c"))]
    with editor.http() as http:
        headers = {"content-type": "multipart/form-data; boundary=b"}
        assert (
            "image[]"
            in assert_error(http.post(EDITS, content=form(parts, "b"), headers=headers), 400, "image")["message"]
        )


def test_text_in_another_charset_is_refused_by_name(editor):
    parts = [part([disposed('name="prompt"'), "Content-Type: text/plain; charset=utf-16"], "x".encode("utf-16"))]
    with editor.http() as http:
        headers = {"content-type": "multipart/form-data; boundary=b"}
        assert (
            "UTF-8"
            in assert_error(http.post(EDITS, content=form(parts, "b"), headers=headers), 400, "prompt")["message"]
        )


NAMES = sorted({*image_fields(Limits()), *EDIT_SCHEMA.options()} - {"stream"})


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    name=st.sampled_from(NAMES),
    brackets=st.lists(st.sampled_from(["[]", "[0]", "[1]", "[a]"]), max_size=3),
    rest=st.sampled_from(['; filename="a.png"', ""]),
    kind=st.sampled_from(["image/png", "text/plain", "application/json", None]),
    data=st.sampled_from([PICTURE, b"\x89PNG\r\n\x1a\n\xff\xfe", b"\xff"]),
)
def test_a_message_never_holds_a_files_bytes(editor, name, brackets, rest, kind, data):
    headers = [disposed(f'name="{name}{"".join(brackets)}"{rest}'), *([f"Content-Type: {kind}"] if kind else [])]
    parts = [part(headers, data)]
    with editor.http() as http:
        answer = http.post(EDITS, content=form(parts, "b"), headers={"content-type": "multipart/form-data; boundary=b"})
    message = assert_error(answer, 400, answer.json()["error"]["param"])["message"]
    assert not any(sign in message for sign in ("\\x", "PNG\\r", "b'", "\ufffd", "IHDR")), message


def test_image_0_is_told_how_to_come(editor):
    body = form([part([disposed('name="image[0]"; filename="a.png"'), "Content-Type: image/png"], PICTURE)], "b")
    with editor.http() as http:
        headers = {"content-type": "multipart/form-data; boundary=b"}
        error = assert_error(http.post(EDITS, content=body, headers=headers), 400, "image")
    assert "image[]" in error["message"] and len(error["message"]) < 250


def test_an_upload_says_what_it_is():
    assert repr([Upload(b"\xff\xfe")]) == "[a file of 2 bytes]"


def test_the_sdk_sends_several_pictures(editor):
    with editor.openai() as client:
        client.images.edit(image=[png(), ("b.png", png(64, 48)), io.BytesIO(png(80, 48))], prompt="x")
    assert [image.size for image in last_params(editor).image] == [(32, 48), (64, 48), (80, 48)]


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("in_file", [False, True], ids=["memory", "file"])
def test_forms(monkeypatch, tmp_path, in_file):
    """Parts are found where they are, whatever in them looks like a boundary, and wherever a piece ends."""
    draw = random.Random(6)
    bits = [b"\r\n", b"\r\n--", b"\r\n--b", b"--b", b"-", b"\r", b"\n", b"x", b"\xff", b"\r\n--b-", "\u00e9".encode()]
    long = 0
    for number in range(300):
        piece = draw.randrange(1, 30)
        monkeypatch.setattr(forms, "_PIECE", piece)
        monkeypatch.setattr(forms, "IN_MEMORY", piece + 12)
        sent = [b"".join(draw.choices(bits, k=draw.randrange(40))) for _ in range(3)]
        sent = [data.replace(b"\r\n--b\r", b"").replace(b"\r\n--b-", b"") for data in sent]
        sent = [b"" if b"\r\n--b" in data + b"\r\n" else data for data in sent]
        body = b"".join(
            b'--b\r\ncontent-disposition: form-data; name="f%d"%s\r\n\r\n%s\r\n'
            % (index, b'; filename="a"' if number % 2 else b"", data)
            for index, data in enumerate(sent)
        )
        fields, files = parse_form(spooled(body + b"--b--\r\n", tmp_path, in_file), Limits(), b"b")
        got = [fields[f"f{index}"] for index in range(3)]
        got = [value.data if isinstance(value, Upload) else value for value in got]
        long += sum(isinstance(value, Stored) for value in got)
        got = [value.encode() if isinstance(value, str) else value for value in got]
        assert [value.read() if isinstance(value, Stored) else value for value in got] == sent
        assert len(files) == (3 if number % 2 else sum(not is_text(data) for data in sent))
    assert long > 100


def is_text(data):
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True
