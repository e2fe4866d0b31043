"""Flags, from what the dataclasses declare."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import click
import pytest

from safelight.cli.options import given, given_settings, sampling_options, setting_options
from safelight.core.options import NULL, Option, option
from safelight.core.package_params import make_params_cls
from safelight.core.params import SamplingParams
from safelight.errors import InvalidParameterError


@dataclass(frozen=True)
class Settings:
    """Settings of a test."""

    form: str = option("choice", "round, or square.", choices=("round", "square"))
    parts: int = option("count", "Parts.", 3, minimum=1)
    seconds: float | None = option("amount", "Seconds.  [default: no limit]")
    quick: bool = option("boolean", "Quick.", True)
    own_forms: Mapping[str, str] = option("by component", "A part's own, as a=round.", {})


class Params(SamplingParams):
    """Parameters of a test."""

    excluded = frozenset({"image"})


def parsed(options, *arguments):
    command = click.Command("x", params=options)
    with command.make_context("x", list(arguments)) as context:
        return context.params


def test_every_setting_has_a_flag_and_what_is_not_given_stays_unset():
    options = setting_options(Settings)
    assert [option.opts for option in options] == [["--form"], ["--parts"], ["--seconds"], ["--quick"], ["--own-forms"]]
    assert given_settings(Settings, parsed(options)) == {}
    arguments = ["--form", "square", "--parts", "5", "--seconds", "1e3", "--no-quick"]
    found = given_settings(Settings, parsed(options, *arguments, "--own-forms", "a=b", "--own-forms", "c=d"))
    assert found == {"form": "square", "parts": 5, "seconds": 1000.0, "quick": False, "own_forms": {"a": "b", "c": "d"}}


def test_help_has_the_default():
    shown = [option.help for option in setting_options(Settings) if isinstance(option, click.Option)]
    assert shown == [
        "round, or square.  [default: round]",
        "Parts.  [default: 3]",
        "Seconds.  [default: no limit]",
        "Quick.  [default: True]",
        "A part's own, as a=round.",
    ]


def test_a_variable_stands_for_a_flag_and_a_flag_goes_before_it(monkeypatch):
    options = setting_options(Settings, {"parts": "SAFELIGHT_TEST_PARTS"})
    monkeypatch.setenv("SAFELIGHT_TEST_PARTS", "7")
    assert parsed(options)["parts"] == 7
    assert parsed(options, "--parts", "8")["parts"] == 8


@pytest.mark.parametrize("arguments", [["--parts", "x"], ["--parts", "1.5"], ["--seconds", "x"], ["--own-forms", "a"]])
def test_what_is_no_value_of_the_kind_is_a_usage_error(arguments):
    with pytest.raises(click.BadParameter):
        parsed(setting_options(Settings), *arguments)


def test_every_parameter_has_a_flag_but_what_is_excluded_or_given_otherwise():
    options = sampling_options(Params, {"height": 64})
    assert {option.name for option in options} == Params.options().keys() - {"prompt", "output_type"}
    (height,) = [option for option in options if option.name == "height"]
    assert isinstance(height, click.Option) and height.help == "Height in pixels.  [default: 64]"
    values = parsed(options, "--height", "32", "-n", "2")
    assert given(Params, values) == {"height": 32, "n": 2}
    with pytest.raises(InvalidParameterError, match="height: got 0; it takes a whole number from 1 to 16384"):
        given(Params, parsed(options, "--height", "0"))


OF_A_PACKAGE = {
    "scale": Option("number or numbers", "how much", nullable=True),
    "instruction": Option("texts", "what to do", nullable=True),
    "kwargs": Option("object", "whatever"),
    "control_image": Option("pictures", "a picture, or several"),
    "video": Option("clip", "a video"),
    "steps": Option("integer", "how many", nullable=True),
}


@pytest.mark.parametrize(
    ("arguments", "fields"),
    [
        (["--scale", "0.5"], {"scale": 0.5}),
        (["--scale", "[0.5, 1]"], {"scale": (0.5, 1.0)}),
        (["--scale", "null"], {"scale": NULL}),
        (["--steps", "null"], {"steps": NULL}),
        (["--instruction", "a", "--instruction", "b"], {"instruction": ("a", "b")}),
        (["--instruction", "a"], {"instruction": ("a",)}),
        (["--instruction", "null"], {"instruction": NULL}),
        (["--kwargs", '{"a": [1, true]}'], {"kwargs": {"a": [1, True]}}),
        (["--control-image", "a.png"], {"control_image": "a.png"}),
        (["--control-image", "a.png", "--control-image", "b.png"], {"control_image": ("a.png", "b.png")}),
        (["--video", "a.mp4"], {"video": "a.mp4"}),
        (["--video", "a.png", "--video", "b.png"], {"video": ("a.png", "b.png")}),
    ],
    ids=str,
)
def test_flags_of_a_packages_pipeline(arguments, fields):
    cls = make_params_cls("X", OF_A_PACKAGE, defaults={}, excluded=(), refused={}, tasks=())
    assert given(cls, parsed(sampling_options(cls, {}), *arguments)) == fields


@pytest.mark.parametrize("arguments", [["--scale", "[1"], ["--kwargs", "{a}"], ["--steps", "x"]], ids=str)
def test_flags_of_a_packages_pipeline_that_are_none(arguments):
    cls = make_params_cls("X", OF_A_PACKAGE, defaults={}, excluded=(), refused={}, tasks=())
    with pytest.raises(click.BadParameter):
        parsed(sampling_options(cls, {}), *arguments)
