"""Bodies looked at a piece at a time: what comes of it is what the standard library makes of the whole."""

from __future__ import annotations

import base64
import json
import random
import time
from urllib.parse import unquote_to_bytes

import pytest

from safelight.serving import pieces
from safelight.serving.errors import MalformedRequestError
from safelight.serving.gate import _parse_json
from safelight.serving.limits import Limits
from safelight.serving.pieces import LongTexts, from_base64, from_percent, has_more, is_blank


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Pieces of seven bytes have every boundary in every place."""
    monkeypatch.setattr(pieces, "PIECE", 7)
    monkeypatch.setattr(pieces.pieces, "__defaults__", (7,))
    monkeypatch.setattr(pieces, "_LONG", 3)


@pytest.mark.parametrize("length", range(40))
def test_base64(length):
    data = random.Random(length).randbytes(length)
    text = base64.b64encode(data)
    for written in (text, text.rstrip(b"="), b"\r\n".join(text[at : at + 5] for at in range(0, len(text), 5))):
        assert from_base64(written) == data
    for at in range(len(text)):
        for wrong in (b"!", b"\0"):
            with pytest.raises(ValueError):
                from_base64(text[:at] + wrong + text[at:])
    for padded in (b"QQ==" + text, b"=" + text, text + b"====="):
        if length:
            with pytest.raises(ValueError):
                from_base64(padded)


def test_percent():
    draw = random.Random(5)
    for _ in range(1000):
        text = "".join(draw.choices(["%", "%41", "%4", "a", "é", "%%", "%zz"], k=draw.randrange(30)))
        assert from_percent(text) == unquote_to_bytes(text)


def documents():
    draw = random.Random(3)
    letters = ['"', "\\", "a", "é", "😀", "\n", " ", "/", "[", "]", "{", "}", ":", ","]

    def text():
        return "".join(draw.choices(letters, k=draw.randrange(12)))

    def value(depth):
        kind = draw.randrange(4 if depth else 2)
        if kind == 2:
            return [value(depth - 1) for _ in range(draw.randrange(4))]
        if kind == 3:
            return {f"{number}{text()}": value(depth - 1) for number in range(draw.randrange(4))}
        return text() if kind else draw.choice([1, 2.5, None, True])

    for _ in range(400):
        document = {"a": value(3), text(): value(2)}
        yield json.dumps(document, ensure_ascii=draw.random() < 0.5, indent=draw.choice([None, 1]))


def test_json():
    taken_out = 0
    for text in documents():
        taken_out += LongTexts(bytearray(text.encode())).are_there
        assert _parse_json(bytearray(text.encode()), Limits()).fields == json.loads(text)
    assert taken_out > 100


def test_damaged_json():
    """What is refused of the whole is refused of the pieces: cut short, and with any byte changed."""
    draw = random.Random(4)
    for text in list(documents())[:60]:
        data = text.encode()
        for _ in range(8):
            changed = bytearray(data)
            changed[draw.randrange(len(data))] = draw.randrange(256)
            for damaged in (changed, bytearray(data[: draw.randrange(len(data))])):
                try:
                    whole = json.loads(damaged.decode())
                except (ValueError, RecursionError):
                    with pytest.raises(MalformedRequestError):
                        _parse_json(damaged, Limits())
                    continue
                try:  # stricter in names that are given twice, and in numbers
                    assert _parse_json(damaged, Limits()).fields == whole
                except MalformedRequestError as error:
                    assert "not JSON" not in str(error) and ("UTF-8" not in str(error) or "surrogate" in str(error))


def test_counting_stops():
    assert is_blank(bytearray(b" \n" * 50)) and is_blank(bytearray()) and not is_blank(bytearray(b" " * 50 + b"a"))
    for most in range(12):
        assert has_more(bytearray(b"a,b[" * 5), (b",", b"["), most) == (most < 10)


def test_escapes_take_time_in_proportion(monkeypatch):
    monkeypatch.setattr(pieces, "_LONG", 1 << 16)
    many = 200_000
    for body in ('"' + "\\n" * many + '"', '"' + '\\"' * many, '""' * many, "\\" * many, '"\\'):
        began = time.process_time()
        LongTexts(bytearray(body.encode()))
        assert time.process_time() - began < 3
