"""How a command line ends: one line for whatever is wrong, and an exit code."""

from __future__ import annotations

import click
import pytest

from safelight.cli import main as command_line
from safelight.errors import ModelIndexError


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (ModelIndexError("model_index.json: no\n such  thing"), 3, "model_index.json: no such thing"),
        (click.UsageError("too many"), 2, "too many"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (ImportError("no module"), 1, "a package is missing or broken: ImportError: no module (safelight -v shows"),
        (ZeroDivisionError("x"), 1, "internal error: ZeroDivisionError: x (safelight -v shows where)"),
    ],
)
def test_an_error_is_one_line_and_a_code(run, monkeypatch, error, code, says):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(command_line.cli, "main", fail)
    ended = run("models")
    assert (ended.code, ended.out, ended.err.count("\n")) == (code, "", 1)
    assert ended.err.startswith(f"safelight: {says}")


def test_a_number_that_a_command_returns_is_the_code(run, monkeypatch):
    for returned, code in ((7, 7), (None, 0)):
        monkeypatch.setattr(command_line.cli, "main", lambda *args, returned=returned, **kwargs: returned)
        assert run("models").code == code


def test_an_unknown_command_suggests_the_nearest(run):
    ended = run("modles")
    assert ended.code == 2 and ended.err == "safelight: unknown command 'modles': did you mean 'models'?\n"


def test_every_command_is_there():
    group = command_line.cli
    with click.Context(group) as context:
        for name in command_line.COMMANDS:
            command = group.get_command(context, name)
            assert command is not None and command.help
        assert group.get_command(context, "none") is None
