"""Bodies of JSON: what is refused, and which numbers are whole."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from safelight.core.options import Option
from safelight.errors import InvalidParameterError
from safelight.serving.http.json_body import read_number
from safelight.serving.limits import Limits
from safelight.serving.own_fields import image_fields
from tests.serving.form_parts import EDITS, GENERATIONS, SEVERAL, last_params, png
from tests.serving.http_server import assert_error, running
from tests.serving.stub_engine import IMAGE_SCHEMA
from tests.serving.wire import JSON, control


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    with running(tmp_path_factory.mktemp("images")) as server, server.http() as http:
        yield http


@pytest.fixture(scope="module")
def expected(images):
    return control(images)


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


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    with running(tmp_path_factory.mktemp("pictures")) as server:
        yield server


@pytest.fixture(scope="module")
def editor(tmp_path_factory):
    with running(tmp_path_factory.mktemp("edits"), SEVERAL) as server:
        yield server


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
