"""Long words made to hurt, in every place that takes a client's: the server's time grows with their length alone."""

from __future__ import annotations

import difflib
import json
import random
import resource
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import safelight
from safelight.errors import InvalidParameterError, UnknownParameterError, shown, without_objects
from safelight.file_kinds import kind_of
from safelight.serving.context import Context, Settings
from safelight.serving.http.errors import MalformedRequestError, ModelNameError, error_body
from tests.serving.hostile_words import WORDS, word

FREE_SECONDS = 0.1
"""Of one request, that are not looked at."""


@pytest.mark.parametrize("length", [100_000, pytest.param(3_000_000, marks=pytest.mark.slow)])
def test_every_place_takes_time_in_proportion(tmp_path, length):
    """One expression that backtracks, or one comparison with all of a name, is the end of the child."""
    most = 60 if length <= 100_000 else 500
    done = subprocess.run(
        [sys.executable, "-m", "tests.serving.hostile_words", str(tmp_path), str(length)],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CPU, (most, most)),
        capture_output=True,
        text=True,
        timeout=4 * most,
    )
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, (rows[-1:], done.stderr[-1000:])
    assert {kind for _, kind, _, _ in rows} == set(WORDS) and len({place for place, _, _, _ in rows}) > 100
    grown = [row for row in rows if row[3] > FREE_SECONDS and row[3] > 3 * row[2] + FREE_SECONDS]
    assert not grown


MARKUP = ["<!---->", "<!-- -->", "<!-->", "-->", "<?xml>", "<?xml ?>", " ", "\n", "<", "<svg", "<!doctype html", "<!--"]


def test_a_files_beginning_is_read_in_one_pass():
    """1 KB of comments, each of which might end at any later one's end."""
    began = time.process_time()
    for begin in MARKUP:
        for repeated in MARKUP:
            assert kind_of((begin + repeated * 500).encode()[:1024]) in (None, "an SVG", "a web page")
    assert time.process_time() - began < 2


def test_markup_is_known_behind_what_may_stand_before_it():
    before = ["", " \n", "<?xml version='1.0'?>", "<!-- a -- b -->\n", "<?xml?><!--a--> <!---->", "<!--<html>-->"]
    for kind, names in {
        "an SVG": ("<svg ", "<SVG>", "<!DOCTYPE svg "),
        "a web page": ("<html>", "<!doctype HTML>"),
    }.items():
        for name in names:
            for text in before:
                assert kind_of(f"{text}{name}".encode()) == kind
                assert kind_of(b"\xef\xbb\xbf" + f"{text}{name}".encode()) == kind
    for other in ("<svgx>", "<html_", "<!-- <svg>", "<?xml", "svg", "<a><svg>"):
        assert kind_of(other.encode()) is None


PLAIN = [3, 1.5, "a'b", b"ab", None, True, [], (), {}, [1, "a"], (1,), (1, 2), {"a": [1, {"b": ()}]}, "x" * 200, [[[]]]]


@pytest.mark.parametrize("value", PLAIN, ids=repr)
def test_a_value_is_shown_as_python_has_it(value):
    whole = repr(value)
    assert shown(value) == (whole if len(whole) <= 80 else f"{whole[:79]}…")


def test_no_more_of_a_value_is_read_than_is_shown():
    large = "x" * 10_000_000
    values = [large, [large] * 1000, {large: large}, [[[large]]], 10**5000, [[]] * 10**6]
    began = time.process_time()
    for value in values:
        assert len(shown(value)) <= 80
        assert len(str(InvalidParameterError("seed", value, "a number"))) < 200
    assert time.process_time() - began < 1


def test_no_comparison_of_strings_sees_all_of_a_name(monkeypatch):
    """Its time and its tables grow with every character: 32 MB took a gigabyte."""
    compared = []

    def close_matches(word, possibilities, **more):
        compared.append(len(word))
        return []

    served = SimpleNamespace(settings=Settings(("org/tiny", "tiny")))
    monkeypatch.setattr(difflib, "get_close_matches", close_matches)
    for kind in WORDS:
        text = word(kind, 10_000)
        assert len(UnknownParameterError(text, ["prompt"]).param or "") <= 100
        with pytest.raises(ModelNameError):
            Context.check_model(served, text)  # type: ignore[arg-type]  # it asks for names alone
    assert len(compared) == 2 * len(WORDS) and max(compared) <= 100
    users = [path for path in (Path(safelight.__file__).parent).rglob("*.py") if "difflib" in path.read_text()]
    assert [path.name for path in users] == ["errors.py"], "whoever compares strings bounds them as it does"


def test_objects_are_not_shown():
    text = "a <PIL.Image.Image image mode=RGB at 0x7fA0> and <b at 0x1> or <c at 0xg>, 1 < 2 <d at 0x1"
    assert without_objects(text, lambda _: "it") == "a it and it or <c at 0xg>, 1 < 2 <d at 0x1"
    draw = random.Random(1)
    for _ in range(2000):
        mixed = "".join(draw.choices(["<", ">", " at 0x", "a1", " ", "z"], k=12))
        assert without_objects(mixed, lambda inside: f"<{inside}>") == mixed


@pytest.mark.parametrize("kind", WORDS)
def test_errors_cut_a_clients_words(kind):
    text = word(kind, 3_000_000)
    began = time.process_time()
    errors = (
        UnknownParameterError(text, ["prompt", "seed"]),
        InvalidParameterError(text, text, text),
        MalformedRequestError.rebuilt(text, text),
    )
    for error in errors:
        answer = error_body(error)["error"]
        assert len(answer["message"]) <= 8000 and len(answer["param"]) <= 100
    assert time.process_time() - began < 1
