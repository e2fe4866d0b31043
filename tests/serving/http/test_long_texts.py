"""Long texts stay where they are, and what comes of the document is what the standard library makes of the whole."""

from __future__ import annotations

import json
import random
import time

import pytest

from safelight.serving.http import long_texts, pieces
from safelight.serving.http.errors import MalformedRequestError
from safelight.serving.http.json_body import parse_json
from safelight.serving.http.long_texts import LongTexts
from safelight.serving.http.spool import LongText, Spool
from safelight.serving.limits import Limits
from tests.serving.http.spools import spooled

pytestmark = pytest.mark.usefixtures("small")


def parsed(data, folder):
    """Parse JSON, and read its long texts."""

    def read(value):
        if isinstance(value, LongText):
            return value.read().decode()
        if isinstance(value, list):
            return [read(entry) for entry in value]
        return {name: read(entry) for name, entry in value.items()} if isinstance(value, dict) else value

    return read(parse_json(spooled(data, folder), Limits())[0])


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
