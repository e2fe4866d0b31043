"""What clients send that were written for OpenAI's server, or for any: values, forms and data URLs."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import textwrap
import threading
import urllib.parse

import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from safelight.core.options import Option
from safelight.errors import InvalidParameterError
from safelight.serving import fields as fields_module
from safelight.serving import jobs_api
from safelight.serving.http.forms import Upload
from safelight.serving.http.json_body import read_number
from safelight.serving.input_pictures import picture_bytes
from safelight.serving.limits import Limits
from safelight.serving.own_fields import VIDEO_FIELDS, image_fields
from tests.serving.http_server import PROMPT, assert_error, running
from tests.serving.stub_engine import EDIT_SCHEMA, IMAGE_SCHEMA, IMAGE_TO_VIDEO_SCHEMA, VIDEO_SCHEMA

SEVERAL = dataclasses.replace(EDIT_SCHEMA, num_input_images=(0, 4))
GENERATIONS, EDITS = "/v1/images/generations", "/v1/images/edits"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    with running(tmp_path_factory.mktemp("pictures")) as server:
        yield server


@pytest.fixture(scope="module")
def editor(tmp_path_factory):
    with running(tmp_path_factory.mktemp("edits"), SEVERAL) as server:
        yield server


def png(width=32, height=48, kind="PNG", color=(200, 10, 10)):
    file = io.BytesIO()
    Image.new("RGB", (width, height), color).save(file, kind)
    return file.getvalue()


def data_url(data, about="data:image/png;base64,"):
    return about + base64.b64encode(data).decode()


def last_params(server):
    return server.engine.submitted[-1].params


# values


@pytest.mark.parametrize(("quality", "resolved", "steps"), [("standard", "medium", 4), ("hd", "high", 6)])
def test_older_names_of_qualities(pictures, editor, quality, resolved, steps):
    with pictures.openai() as client:
        assert client.images.generate(prompt=PROMPT, quality=quality).quality == resolved
        assert last_params(pictures).num_inference_steps == steps
        (event,) = client.images.generate(prompt=PROMPT, quality=quality, stream=True)
        assert event.quality == resolved
    with editor.openai() as client:
        assert client.images.edit(image=png(), prompt="x", quality=quality).quality == resolved
        assert last_params(editor).num_inference_steps == steps


@pytest.mark.parametrize("output_format", [None, "png", "webp", "jpeg"])
def test_full_output_compression_goes_with_every_format(pictures, output_format):
    with pictures.openai() as client:
        answer = client.images.generate(prompt=PROMPT, output_format=output_format, output_compression=100)
        assert answer.output_format == (output_format or "png") and answer.warnings == []
        if output_format in (None, "png"):
            for compression in (0, 99):
                with pytest.raises(openai.BadRequestError, match="100 or null") as caught:
                    client.images.generate(prompt=PROMPT, output_format=output_format, output_compression=compression)
                assert caught.value.param == "output_compression"


def test_input_fidelity_has_no_effect_and_says_so(editor):
    with editor.openai() as client:
        for fidelity in ("high", "low"):
            answer = client.images.edit(image=png(), prompt="x", input_fidelity=fidelity, extra_body={"seed": 1})
            assert [text for text in answer.warnings if "fidelity" in text] == ["input_fidelity has no effect"]
        plain = client.images.edit(image=png(), prompt="x", extra_body={"seed": 1})
        assert "fidelity" not in str(plain.warnings) and plain.data[0].b64_json == answer.data[0].b64_json


def test_what_is_of_edits_is_unknown_to_a_model_without_pictures(pictures, editor):
    with pictures.http() as http, editor.http() as edits:
        for name in ("input_fidelity", "images"):
            assert assert_error(http.post(GENERATIONS, json={"prompt": "x", name: "high"}), 400, name)["code"] == (
                "unknown_parameter"
            )
            schemas = [each.get("/v1/models/tiny/schema").json()["properties"] for each in (http, edits)]
            assert [name in schema for schema in schemas] == [False, True]


def test_a_mask_that_is_null_is_none(pictures, editor):
    with editor.http() as http:
        answer = http.post(EDITS, json={"prompt": "x", "image": data_url(png()), "mask": None})
        assert answer.status_code == 200
        assert_error(http.post(EDITS, json={"prompt": "x", "image": data_url(png()), "musk": None}), 400, "musk")


INTEGERS = {
    **{name: option for name, option in image_fields(Limits()).items() if option.kind == "integer"},
    **{name: option for name, option in IMAGE_SCHEMA.params_cls.options().items() if option.kind == "integer"},
}
VALUES = {"height": 64, "width": 96, "output_compression": 100, "partial_images": 0}


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize("written", ["{}.0", "{}.000", "{}e0", "{}.0E+0"])
def test_a_number_is_whole_if_its_value_is(pictures, editor, name, written):
    """JSON Schema, 6.1.1; in a form's text too."""
    value = VALUES.get(name, 2)
    text = written.format(value)
    with pictures.http() as http, editor.http() as edits:
        body = f'{{"prompt": "x", "{name}": {text}}}'
        answer = http.post(GENERATIONS, content=body, headers={"content-type": "application/json"})
        assert answer.status_code == 200, answer.text
        if name in IMAGE_SCHEMA.params_cls.options():
            made = getattr(last_params(pictures), name)
            assert made == value and type(made) is int
        form = {"prompt": (None, "x"), "image": ("a", png()), name: (None, text)}
        answer = edits.post(EDITS, files=form)
        assert answer.status_code == 200, answer.text
        for broken in (f"{value}.5", f"{value or 1}e-9"):
            body = f'{{"prompt": "x", "{name}": {broken}}}'
            answer = http.post(GENERATIONS, content=body, headers={"content-type": "application/json"})
            assert "whole number" in assert_error(answer, 400, name)["message"]
            form[name] = (None, broken)
            assert_error(edits.post(EDITS, files=form), 400, name)


@pytest.mark.parametrize("seed", [2**53 + 1, 2**63 + 1, 2**64 - 1])
def test_a_whole_number_keeps_its_last_digit(pictures, seed):
    with pictures.http() as http:
        body = f'{{"prompt": "x", "seed": {seed}.0}}'
        answer = http.post(GENERATIONS, content=body, headers={"content-type": "application/json"})
        assert answer.json()["data"][0]["seed"] == seed


@given(value=st.integers(-(10**30), 10**30), zeros=st.integers(0, 5))
@settings(derandomize=True, deadline=None)
def test_reading_numbers(value, zeros):
    found = read_number(f"{value}.{'0' * (zeros + 1)}")
    assert found == value and type(found) is int
    assert Option("integers", "x").check("x", [float(value % 2**53), value]) == (value % 2**53, value)
    with pytest.raises(InvalidParameterError):
        Option("integers", "x").check("x", [value % 2**50 + 0.5])


def test_a_page_of_three_point_nought(tmp_path):
    with running(tmp_path, VIDEO_SCHEMA) as server, server.http() as http:
        for _ in range(3):
            http.post("/v1/videos", json={"prompt": "x", "num_frames": 5.0, "seconds": None})
        assert len(http.get("/v1/videos?limit=2.0").json()["data"]) == 2
        assert_error(http.get("/v1/videos?limit=2.5"), 400, "limit")


# pictures in JSON


def test_edits_as_json(editor):
    """As the SDK's other languages and the API's reference write them."""
    with editor.http() as http:
        for images in (
            [{"image_url": data_url(png())}],
            [{"image_url": data_url(png()), "file_id": None}],
            [{"image_url": data_url(png(64, 32))}, {"image_url": data_url(png())}],
            [data_url(png())],
        ):
            answer = http.post(EDITS, json={"prompt": "x", "images": images, "n": 1, "seed": 1})
            assert answer.status_code == 200, answer.text
            sizes = [image.size for image in last_params(editor).image]
            assert sizes == ([(64, 32), (32, 48)] if len(images) == 2 else [(32, 48)])
        both = {"images": [{"image_url": data_url(png())}], "image": data_url(png())}
        assert "another field" in assert_error(http.post(EDITS, json={"prompt": "x", **both}), 400, "image")["message"]
        assert_error(http.post(EDITS, json={"prompt": "x", "images": []}), 400, "images")
        none = http.post(EDITS, json={"prompt": "x", "images": None})
        assert_error(none, 400, "image")
        many = http.post(EDITS, json={"prompt": "x", "images": [data_url(png())] * 5})
        assert "0 to 4" in assert_error(many, 400, "image")["message"]


@pytest.mark.parametrize("field", ["images", "image"])
def test_a_file_id_is_refused_by_name(editor, field):
    with editor.http() as http:
        for reference in ({"file_id": "file-abc"}, {"file_id": "file-abc", "image_url": data_url(png())}):
            error = assert_error(http.post(EDITS, json={"prompt": "x", field: [reference]}), 400, field)
            assert "file_id" in error["message"] and "image_url" in error["message"]


@pytest.mark.parametrize(
    "reference",
    [{"image_url": {"url": "data:,"}}, {"url": "x"}, {}, {"image_url": None}, {"type": "a", "image_url": "b"}],
)
def test_other_objects_are_refused(editor, reference):
    with editor.http() as http:
        assert_error(http.post(EDITS, json={"prompt": "x", "images": [reference]}), 400, "images")


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


@pytest.mark.parametrize(
    ("module", "function"), [(fields_module, "picture_bytes"), (jobs_api, "request_digest")], ids=["read", "hash"]
)
def test_large_bodies_are_looked_at_in_a_thread(editor, monkeypatch, module, function):
    threads, real = [], vars(module)[function]

    def recorded(*arguments):
        threads.append(threading.current_thread().name)
        return real(*arguments)

    monkeypatch.setattr(module, function, recorded)
    file = io.BytesIO()
    Image.effect_noise((400, 400), 100).save(file, "PNG")
    with editor.http() as http:
        for index, data in enumerate((file.getvalue(), png())):
            headers = {"idempotency-key": f"{function} {index}", "prefer": "respond-async"}
            answer = http.post(EDITS, json={"prompt": "x", "image": data_url(data)}, headers=headers)
            assert answer.status_code == 202
    assert threads[0] != "server" and threads[1] == "server"


# forms, as clients write them


def part(headers, content):
    lines = headers if isinstance(headers, list) else [headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + content


def disposed(rest):
    return f"Content-Disposition: form-data; {rest}"


PICTURE = png()
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


def form(parts, boundary, begin=b"", end=b"\r\n"):
    mark = b"--" + boundary.encode()
    return begin + b"".join(mark + b"\r\n" + each + b"\r\n" for each in parts) + mark + b"--" + end


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
    options, lists = {**schema.params_cls.options(), **own}, ("image", "images", "numbers", "integers")
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


NAMES = sorted({*image_fields(Limits()), *EDIT_SCHEMA.params_cls.options()} - {"stream"})


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


@pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")
def test_a_video_begins_with_a_picture_however_it_comes(tmp_path):
    with running(tmp_path, IMAGE_TO_VIDEO_SCHEMA) as server, server.http() as http:
        for reference in (data_url(png()), {"image_url": data_url(png())}):
            answer = http.post("/v1/videos", json={"prompt": "x", "input_reference": reference, "seconds": 1})
            assert answer.status_code == 200, answer.text
        parts = [part([disposed('name="input_reference"'), "Content-Type: image/png"], PICTURE)]
        parts.append(part(disposed('name="prompt"'), b"x"))
        headers = {"content-type": "multipart/form-data; boundary=b"}
        assert http.post("/v1/videos", content=form(parts, "b"), headers=headers).status_code == 200
        answer = http.post("/v1/videos", json={"prompt": "x", "input_reference": {"file_id": "file_1"}})
        assert "file_id" in assert_error(answer, 400, "input_reference")["message"]
        assert json.loads(answer.content)["error"]["type"] == "invalid_request_error"
