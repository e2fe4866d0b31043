"""Bodies looked at a piece at a time: what comes of it is what the standard library makes of the whole."""

from __future__ import annotations

import base64
import json
import random
import time
from urllib.parse import unquote_to_bytes

import pytest

from safelight.serving.http import forms, long_texts, pieces, spool
from safelight.serving.http.errors import MalformedRequestError
from safelight.serving.http.forms import Upload, parse_form
from safelight.serving.http.json_body import parse_json
from safelight.serving.http.long_texts import LongTexts
from safelight.serving.http.pieces import from_percent, has_more, to_base64
from safelight.serving.http.spool import LongText, Spool, Stored
from safelight.serving.limits import Limits


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Pieces of seven bytes have every boundary in every place."""
    monkeypatch.setattr(pieces, "PIECE", 7)
    monkeypatch.setattr(pieces, "ESCAPED_PIECE", 5)
    for module in (pieces, long_texts, spool):
        monkeypatch.setattr(module, "turn", lambda: None)
    monkeypatch.setattr(pieces.pieces, "__defaults__", (7,))
    monkeypatch.setattr(Stored.pieces, "__defaults__", (0, 7))
    monkeypatch.setattr(long_texts, "_LONG", 3)


def spooled(data, folder, in_file=False):
    found = Spool(folder)
    found.keep(data)
    if in_file:
        found.flush()
    return found


def parsed(data, folder):
    """Parse JSON, and read its long texts."""

    def read(value):
        if isinstance(value, LongText):
            return value.read().decode()
        if isinstance(value, list):
            return [read(entry) for entry in value]
        return {name: read(entry) for name, entry in value.items()} if isinstance(value, dict) else value

    return read(parse_json(spooled(data, folder), Limits())[0])


@pytest.mark.parametrize("length", range(40))
def test_base64(length):
    data = random.Random(length).randbytes(length)
    text = base64.b64encode(data)
    assert b"".join(to_base64(pieces.pieces(data))) == text

    def from_base64(text):
        return b"".join(pieces.from_base64(pieces.pieces(text)))

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
        assert b"".join(from_percent(pieces.pieces(text.encode()))) == unquote_to_bytes(text)


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
        written = json.dumps(document, ensure_ascii=draw.random() < 0.5, indent=draw.choice([None, 1]))
        yield written.replace("/", "\\/") if draw.random() < 0.5 else written  # as some writers escape it


def test_json(tmp_path):
    taken_out = 0
    for text in documents():
        taken_out += LongTexts(bytearray(text.encode()), Spool(tmp_path)).are_there
        assert parsed(text.encode(), tmp_path) == json.loads(text)
    assert taken_out > 100


def test_damaged_json(tmp_path):
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
                        parsed(damaged, tmp_path)
                    continue
                try:  # stricter in names that are given twice, and in numbers
                    assert parsed(damaged, tmp_path) == whole
                except MalformedRequestError as error:
                    assert "not JSON" not in str(error) and ("UTF-8" not in str(error) or "surrogate" in str(error))


def test_counting_stops():
    for most in range(12):
        assert has_more(bytearray(b"a,b[" * 5), most) == (most < 10)
        assert has_more(bytearray(b"\\/abcde" * 70), most) == (most < 7)


def test_escapes_take_time_in_proportion(monkeypatch, tmp_path):
    monkeypatch.setattr(long_texts, "_LONG", 1 << 16)
    monkeypatch.setattr(pieces, "PIECE", 1 << 18)
    many = 200_000
    for body in (
        '"' + "\\n" * many + '"',
        '"' + "\\/" * many + '"',
        '"' + '\\"' * many,
        '""' * many,
        "\\" * many,
        '"\\',
    ):
        began = time.process_time()
        LongTexts(bytearray(body.encode()), Spool(tmp_path))
        assert time.process_time() - began < 3


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
