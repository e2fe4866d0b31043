"""One way to declare an option: what is said of a field is what is checked, described and listed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import pytest

from safelight.attention import BACKENDS
from safelight.core.options import KINDS, Option, check_settings, defaults_of, listed, option, options_of
from safelight.core.params import SamplingParams
from safelight.core.server_args import ServerArgs
from safelight.errors import InvalidParameterError
from safelight.serving.http_args import HTTPArgs

DECLARED = [
    (cls, name, known) for cls in (SamplingParams, ServerArgs, HTTPArgs) for name, known in options_of(cls).items()
]


@dataclass(frozen=True)
class Settings:
    """Settings of a test."""

    name: str | None = option("text", "A name.")
    form: str = option("choice", "round, or square.", choices=("round", "square"))
    parts: int = option("count", "Parts.", 3, minimum=1, maximum=9)
    seconds: float = option("amount", "Seconds.", 2.5, minimum=0.5)
    quick: bool = option("boolean", "Quick.", False)
    own: Mapping[str, str] = option("by component", "A component's own.", {})


def test_a_field_has_its_default_and_what_was_declared_of_it():
    assert defaults_of(Settings) == vars(Settings()) == {
        "name": None, "form": "round", "parts": 3, "seconds": 2.5, "quick": False, "own": {},
    }  # fmt: skip
    assert Settings().own is not Settings().own
    assert options_of(Settings)["parts"] == Option("count", "Parts.", minimum=1, maximum=9)


@pytest.mark.parametrize(
    ("name", "value", "takes"),
    [
        ("form", "oval", "round, square"),
        ("form", None, "round, square"),
        ("parts", 0, "a whole number from 1 to 9"),
        ("parts", 10, "a whole number from 1 to 9"),
        ("parts", True, "a whole number from 1 to 9"),
        ("parts", 2.0, "a whole number from 1 to 9"),
        ("parts", None, "a whole number from 1 to 9"),
        ("seconds", 0.4, "a number of at least 0.5"),
        ("seconds", math.nan, "a number of at least 0.5"),
        ("seconds", "3", "a number of at least 0.5"),
        ("quick", "yes", "true or false"),
        ("own", ["a"], "names with values"),
    ],
)
def test_a_setting_that_is_wrong_is_refused_by_name(name, value, takes):
    with pytest.raises(InvalidParameterError) as caught:
        check_settings(Settings(**{name: value}))
    assert caught.value.param == name and str(caught.value).endswith(f"; it takes {takes}")


@pytest.mark.parametrize(
    "given",
    [{}, {"name": "x"}, {"name": None}, {"form": "square"}, {"parts": 9}, {"seconds": 1}, {"seconds": math.inf}],
)
def test_a_setting_that_is_right_stays_as_it_is(given):
    settings = Settings(**given)
    check_settings(settings)
    assert vars(settings).items() >= given.items()


def test_a_parameter_becomes_a_plain_value():
    assert Option("integer", "x").check("x", 3.0) == 3 and type(Option("integer", "x").check("x", 3.0)) is int
    assert Option("numbers", "x", minimum=0, maximum=1).check("x", [0, 1.0]) == (0.0, 1.0)
    for wrong in ([], [0.5, 2], [True], 0.5, "0.5"):
        with pytest.raises(InvalidParameterError, match=r"x: got .*; it takes a list of finite numbers from 0 to 1"):
            Option("numbers", "x", minimum=0, maximum=1).check("x", wrong)
    with pytest.raises(InvalidParameterError, match="x: got 'c'; it takes one of a, b"):
        Option("string", "x", choices=("a", "b")).check("x", "c")


def test_json_schema_has_the_range_and_the_choices():
    assert Option("integer", "steps", "basic", 1, 9).json_schema() == {
        "type": "integer", "description": "steps", "x-group": "basic", "minimum": 1, "maximum": 9,
    }  # fmt: skip
    assert Option("numbers", "x", maximum=1).json_schema()["items"] == {"type": "number", "maximum": 1}
    assert Option("choice", "x", choices=("a", "b")).json_schema()["enum"] == ["a", "b"]
    assert KINDS["numbers"].json_schema["items"] == {"type": "number"}, "the table is everybody's"


@pytest.mark.parametrize(
    ("cls", "name", "known"), DECLARED, ids=[f"{cls.__name__}.{name}" for cls, name, _ in DECLARED]
)
def test_every_declaration_is_whole(cls, name, known):
    """Of a known kind, with words; its default is taken; every choice that a setting has is in its help."""
    assert known.kind in KINDS and known.help and known.group in ("basic", "advanced")
    if cls is not SamplingParams:
        cls(**{name: defaults_of(cls)[name]})
        assert not [choice for choice in known.choices if choice not in known.help]
    if known.minimum is not None and "number" not in known.kind:
        with pytest.raises(InvalidParameterError, match=f"^{name}: got "):
            known.check(name, known.minimum - 1)


def test_attentions_help_has_every_row_of_its_table():
    assert options_of(ServerArgs)["attention_backend"].help == f"{listed(('auto', *BACKENDS))}."


def test_choices_in_a_sentence():
    assert listed(("a", "b", "c")) == "a, b or c"
    assert listed(("a", "b"), ", or ") == "a, or b"
