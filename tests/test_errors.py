"""Errors as one tree: what a client reads of them, and that nothing huge is ever shown."""

from __future__ import annotations

import errno

import pytest

from safelight.errors import (
    MAX_NAME,
    MAX_REASON,
    ConflictError,
    InvalidParameterError,
    ModelError,
    ModelNotFoundError,
    PortError,
    QueueFullError,
    RateLimitError,
    SafelightError,
    StateDirectoryError,
    StorageError,
    StorageFailedError,
    StorageFullError,
    UnknownParameterError,
    UsageError,
    by_code,
    in_one_line,
    nearest,
    shown,
    without_objects,
)
from safelight.serving.http import errors as server_errors


def all_errors(base=SafelightError):
    return [base, *(each for cls in base.__subclasses__() for each in all_errors(cls))]


def test_a_code_is_of_one_class_and_what_is_below_it():
    """What a code stands for does not depend on what is imported: the server's own errors are among them."""
    assert server_errors.ModelNameError in all_errors()
    for cls in all_errors():
        assert issubclass(cls, by_code(cls.code)) and cls.status in range(400, 600)
    assert by_code("of no class") is SafelightError


@pytest.mark.parametrize(
    ("cls", "code"),
    [(UsageError, 2), (ModelError, 3), (ModelNotFoundError, 3), (PortError, 4), (StateDirectoryError, 5)],
)
def test_commands_end_with_the_code_of_the_branch(cls, code):
    assert cls.exit_code == code
    assert SafelightError.exit_code == ConflictError.exit_code == 1


def test_a_message_names_the_field_what_it_got_and_what_it_takes():
    error = InvalidParameterError("height", 7, "a multiple of 16")
    assert str(error) == "height: got 7; it takes a multiple of 16" and error.param == "height"
    unknown = UnknownParameterError("heigth", ["height", "width"])
    assert str(unknown) == "unknown parameter 'heigth': did you mean 'height'?"
    assert UnknownParameterError("x" * 1000, ["height"]).param == "x" * MAX_NAME


def test_an_error_crosses_processes_by_its_class_and_message():
    error = InvalidParameterError.rebuilt("height: got 7; it takes less", "height")
    assert isinstance(error, InvalidParameterError) and str(error) == "height: got 7; it takes less"
    assert error.param == "height" and RateLimitError.rebuilt("later").retry_after == QueueFullError.retry_after


@pytest.mark.parametrize(
    ("number", "cls"),
    [(errno.ENOSPC, StorageFullError), (errno.EDQUOT, StorageFullError), (errno.EIO, StorageFailedError)],
)
def test_a_disk_that_fails_is_told_without_a_path(number, cls):
    error = StorageError.of(OSError(number, "no", "/secret"), "the picture")
    assert type(error) is cls and str(error).startswith("the picture: ") and "/secret" not in str(error)


def test_names_are_suggested_or_listed():
    assert nearest("colour", ["color", "size"]) == "did you mean 'color'?"
    assert nearest("zzz", ["b", "a"]) == "known are a, b"


def test_what_is_shown_is_short_and_one_line():
    assert shown([1, (2,), {"a": "b"}]) == "[1, (2,), {'a': 'b'}]"
    assert shown("x" * 10**6) == f"'{'x' * 78}…" and shown(10**400) == "a whole number of 1329 bits"
    assert in_one_line(ValueError("two\n  lines")) == "two lines" and in_one_line(ValueError()) == "ValueError"
    assert len(in_one_line(ValueError("x" * 10**6))) == MAX_REASON


def test_objects_lose_their_addresses():
    assert without_objects("<a.B object at 0x7f> < 3", lambda inside: inside.split()[0]) == "a.B < 3"
