"""Every error that Safelight raises on purpose, as one tree.

A user's mistake names the field, what it got and what it takes. `exit_code` is what the command line ends with:
2 for usage, 3 for a model that cannot be loaded, 1 for a generation that failed.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SafelightError(Exception):
    """Base of every error that Safelight raises on purpose."""

    exit_code = 1


class UsageError(SafelightError):
    """What was asked for cannot be done as it was asked."""

    exit_code = 2


class InvalidParameterError(UsageError):
    """A parameter has a value that this model does not take.

    Attributes:
        param: the parameter's name.

    """

    def __init__(self, param: str, got: object, takes: str) -> None:
        self.param = param
        super().__init__(f"{param}: got {shown(got)}; it takes {takes}")


class UnknownParameterError(UsageError):
    """A parameter that this model does not have.

    Attributes:
        param: the name that was given.

    """

    def __init__(self, param: str, known: Iterable[str], instead: str | None = None) -> None:
        self.param = param
        hint = instead or nearest(param, known)
        super().__init__(f"unknown parameter {param!r}: {hint}")


class OutputError(UsageError):
    """A result cannot be written where it was asked to go."""


class MissingDependencyError(UsageError):
    """An optional package is needed; the message names the extra that brings it."""


class ModelError(SafelightError):
    """A model cannot be loaded."""

    exit_code = 3


class ModelNotFoundError(ModelError):
    """No model repository under that name or path."""


class ModelAccessError(ModelError):
    """The repository is gated or private, and the token does not open it."""


class ModelIndexError(ModelError):
    """`model_index.json`, or a component's configuration, is missing, malformed, or asks for what is not supported."""


class CheckpointError(ModelError):
    """A checkpoint's files are missing, damaged, of a refused kind, or do not fit the model."""


class NonFiniteOutputError(SafelightError):
    """Latents or pixels hold NaN or infinity; no picture is made of them."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Suggest the known name closest to `name`, or list them all."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else f"known are {', '.join(names)}"


def shown(value: object, limit: int = 80) -> str:
    """Represent a value for a message, cut to `limit` characters."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit - 1]}…"
