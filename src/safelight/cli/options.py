"""Command-line options made from the dataclasses: the model's parameters, and settings of engine and HTTP."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from safelight.core.options import NULL, STRUCTURED, Option, defaults_of, options_of
from safelight.core.params import SamplingParams

if TYPE_CHECKING:
    from safelight.loading.repository import Repository

API_KEY_FILE_VARIABLE = "SAFELIGHT_API_KEY_FILE"
POSITIONAL = "prompt"
NOT_OFFERED = frozenset({POSITIONAL, "output_type"})
"""The prompt is an argument, and files are always made of pictures."""


def list_of(convert: Callable[[str], Any], what: str) -> Callable[[str], tuple[Any, ...]]:
    """Return what parses entries that are separated by commas; `what` they are is said where they are not."""

    def parse(text: str) -> tuple[Any, ...]:
        try:
            return tuple(convert(entry) for entry in text.split(","))
        except ValueError as error:
            raise click.BadParameter(f"{text!r} is not a list of {what}") from error

    return parse


def key_value(text: str) -> tuple[str, str]:
    """Parse NAME=VALUE."""
    name, separator, value = text.partition("=")
    if not (name and separator and value):
        raise click.BadParameter(f"{text!r} is not of the form name=value")
    return name, value


def json_value(text: str) -> Any:
    """Parse a number, true or false, or a list or an object of JSON; any other text stays text."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        if text.startswith(("[", "{")):
            raise click.BadParameter(f"{text!r} is not JSON") from error
        return text


class OrNull(click.ParamType[Any]):
    """What takes the word null for null, and everything else as another type does."""

    def __init__(self, other: Any) -> None:
        self._other = click.types.convert_type(other)
        self.name = self._other.name

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return a value of the other type, or `NULL`."""
        return NULL if value in ("null", NULL) else self._other.convert(value, param, ctx)


def said(args: Sequence[str], names: Sequence[str]) -> dict[str, list[str]]:
    """Return what a command line says of some flags, before it is parsed: the options may depend on it."""
    values: dict[str, list[str]] = {name: [] for name in names}
    for index, argument in enumerate(args):
        name, separator, value = argument.partition("=")
        if name.removeprefix("--") in values and name.startswith("--"):
            values[name.removeprefix("--")] += [value] if separator else args[index + 1 : index + 2]
    return values


CLICK_TYPES: Mapping[str, Any] = {
    "integer": click.INT,
    "count": click.INT,
    "number": click.FLOAT,
    "amount": click.FLOAT,
    "integers": list_of(int, "whole numbers such as 4,6"),
    "numbers": list_of(float, "numbers such as 1.0,0.5"),
    "images": click.Path(),
    "pictures": click.Path(),
    "clip": click.Path(),
    **dict.fromkeys(STRUCTURED, json_value),
    "by component": key_value,
}
"""By the kind of an option; of other kinds it is text."""
REPEATED = frozenset({"images", "pictures", "clip", "texts", "by component"})
"""Kinds whose flags may be given several times."""
ONE_IS_ONE = frozenset({"pictures", "clip"})
"""Of these, kinds of which one value is no list."""
WITH_NULL = frozenset({*STRUCTURED, "integer", "number", "integers", "numbers", "texts", "pictures", "clip"})
"""Kinds of which the word null is null, where that is a value."""


def click_option(name: str, option: Option, help: str, default: Any = None, **details: Any) -> click.Option:
    """Return the command line's option for a field.

    Args:
        name: of the field.
        option: what was declared of it.
        help: one line, to which the default is added.
        default: what it is if nobody says it; shown alone: what is not given stays unset.
        **details: for click.

    """
    flag = f"--{name.replace('_', '-')}"
    shown = "" if default is None or isinstance(default, Mapping) else f"  [default: {default}]"
    details |= {"help": help + shown, "default": None, "multiple": option.kind in REPEATED}
    if option.kind == "boolean":
        return click.Option([f"{flag}/--no-{flag[2:]}", name], **details)
    kind = click.Choice(option.choices) if option.kind == "string" and option.choices else CLICK_TYPES.get(option.kind)
    if option.nullable and option.kind in WITH_NULL:
        kind = OrNull(kind)
    short = [f"-{name}"] if len(name) == 1 else []
    return click.Option([*short, flag, name], type=kind or click.STRING, **details)


def sampling_options(params_cls: type[SamplingParams], defaults: Mapping[str, Any]) -> list[click.Parameter]:
    """Return an option for each field that a model takes."""
    return [
        click_option(name, option, f"{option.help[0].upper()}{option.help[1:]}.", defaults.get(name))
        for name, option in params_cls.options().items()
        if name not in NOT_OFFERED
    ]


def model_defaults(repository: Repository) -> dict[str, Any]:
    """Return what unset fields take: the family's values, with the repository's own over them."""
    return {**repository.pipeline.sampling_param_cls().defaults, **repository.sampling_defaults()}


def setting_options(cls: type, variables: Mapping[str, str] | None = None) -> list[click.Parameter]:
    """Return an option for each setting of the engine (`ServerArgs`) or of HTTP (`HTTPArgs`).

    Args:
        cls: the dataclass of the settings.
        variables: of the environment, by the settings that they name where no flag does.

    """
    defaults = defaults_of(cls)
    return [
        click_option(name, option, option.help, defaults[name] or None, envvar=(variables or {}).get(name))
        for name, option in options_of(cls).items()
    ]


def given(params_cls: type[SamplingParams], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return, of all parsed values, the sampling fields that the user set, each checked by itself.

    Raises:
        InvalidParameterError: naming the field, what it got and what it takes.

    """
    options = params_cls.options()
    fields = {name: values[name] for name in options if values.get(name) not in (None, ())}
    for name, value in fields.items():
        if options[name].kind in REPEATED and len(value) == 1 and (options[name].kind in ONE_IS_ONE or NULL in value):
            fields[name] = value[0]
    return {name: options[name].check(name, value) for name, value in fields.items()}


def given_settings(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return, of all parsed values, the settings of a dataclass that the user set."""
    settings = {name: values[name] for name in options_of(cls) if values[name] not in (None, ())}
    return {name: dict(value) if isinstance(value, tuple) else value for name, value in settings.items()}
