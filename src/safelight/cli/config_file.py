"""A file of settings, of engine and HTTP: the same names as the flags, in YAML."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from safelight.core.options import defaults_of
from safelight.core.server_args import ServerArgs
from safelight.errors import InvalidParameterError, UnknownParameterError, UsageError
from safelight.serving.http_args import HTTPArgs


def read_config(path: Path) -> dict[str, Any]:
    """Return the settings in a YAML file, of engine and HTTP, by the names of their fields.

    Raises:
        UsageError: if it cannot be read, or has a key that is no setting.

    """
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(f"config: {str(path)!r} is no YAML file of settings: {reason}") from error
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise UsageError(f"config: {str(path)!r} holds no settings by name")
    defaults = defaults_of(ServerArgs) | defaults_of(HTTPArgs)
    for name, value in loaded.items():
        if name not in defaults:
            raise UnknownParameterError(str(name), defaults)
        _check_type(name, value, defaults[name])
    return loaded


def _check_type(name: str, value: Any, default: Any) -> None:
    """Refuse a value that is of another kind than the setting's default."""
    if default is None or value is None:
        fits = value is None or isinstance(value, str | int)
    elif isinstance(default, float):
        fits = isinstance(value, int | float) and not isinstance(value, bool)
    else:
        fits = type(value) is type(default)
    if not fits:
        raise InvalidParameterError(name, value, f"a value of the kind of {default!r}")
