"""Command-line options made from the dataclasses: of the model's parameters, and of the engine's settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import click

from safelight.core.params import Option, SamplingParams
from safelight.core.server_args import ServerArgs

API_KEY_FILE_VARIABLE = "SAFELIGHT_API_KEY_FILE"
POSITIONAL = "prompt"
NOT_OFFERED = frozenset({POSITIONAL, "output_type"})
"""The prompt is an argument, and files are always made of pictures."""


def float_list(text: str) -> tuple[float, ...]:
    """Parse numbers that are separated by commas."""
    try:
        return tuple(float(entry) for entry in text.split(","))
    except ValueError as error:
        raise click.BadParameter(f"{text!r} is not a list of numbers such as 1.0,0.5") from error


def integer_list(text: str) -> tuple[int, ...]:
    """Parse whole numbers that are separated by commas."""
    try:
        return tuple(int(entry) for entry in text.split(","))
    except ValueError as error:
        raise click.BadParameter(f"{text!r} is not a list of whole numbers such as 4,6") from error


def key_value(text: str) -> tuple[str, str]:
    """Parse NAME=VALUE."""
    name, separator, value = text.partition("=")
    if not (name and separator and value):
        raise click.BadParameter(f"{text!r} is not of the form name=value")
    return name, value


CLICK_TYPES: Mapping[str, Any] = {
    "integer": click.INT,
    "number": click.FLOAT,
    "integers": integer_list,
    "numbers": float_list,
}


def sampling_options(params_cls: type[SamplingParams], defaults: Mapping[str, Any]) -> list[click.Parameter]:
    """Return an option for each field that a model takes."""
    offered = {name: option for name, option in params_cls.options().items() if name not in NOT_OFFERED}
    return [_sampling_option(name, option, defaults.get(name)) for name, option in offered.items()]


def _sampling_option(name: str, option: Option, default: Any) -> click.Option:
    flag = f"--{name.replace('_', '-')}"
    known = "" if default is None or isinstance(default, Mapping) else f"  [default: {default}]"
    details: dict[str, Any] = {"help": f"{option.help[0].upper()}{option.help[1:]}.{known}"}
    if option.kind == "images":
        return click.Option([flag, name], type=click.Path(), multiple=True, **details)
    if option.kind == "boolean":
        return click.Option([f"{flag}/--no-{name.replace('_', '-')}", name], default=None, **details)
    if option.choices:
        return click.Option([flag, name], type=click.Choice(option.choices), **details)
    short = [f"-{name}"] if len(name) == 1 else []
    return click.Option([*short, flag, name], type=CLICK_TYPES.get(option.kind, click.STRING), **details)


def given(params_cls: type[SamplingParams], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return, of all parsed values, the sampling fields that the user set, each checked by itself.

    Raises:
        InvalidParameterError: naming the field, what it got and what it takes.

    """
    options = params_cls.options()
    fields = {name: values[name] for name in options if values.get(name) not in (None, ())}
    return {name: options[name].check(name, value) for name, value in fields.items()}


CLICK_KINDS: Mapping[type, Any] = {int: click.INT, float: click.FLOAT}
ENGINE_FIELDS = {field.name: field for field in dataclasses.fields(ServerArgs)}


def engine_options() -> list[click.Parameter]:
    """Return an option for each setting of the engine."""
    options: list[click.Parameter] = []
    for name, field in ENGINE_FIELDS.items():
        flag = f"--{name.replace('_', '-')}"
        several = field.default_factory is dict
        if type(field.default) is bool:
            options.append(click.Option([f"{flag}/--no-{flag[2:]}", name], help=field.metadata["help"], default=None))
            continue
        kind = key_value if several else CLICK_KINDS.get(type(field.default), click.STRING)
        options.append(click.Option([flag, name], help=field.metadata["help"], multiple=several, type=kind))
    return options


def engine_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return, of all parsed values, the engine's settings that the user set."""
    settings = {name: values[name] for name in ENGINE_FIELDS if values[name] not in (None, ())}
    return {name: dict(value) if isinstance(value, tuple) else value for name, value in settings.items()}
