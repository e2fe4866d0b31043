"""What a log and a terminal show of data: nothing that a terminal obeys, and one cause only so often."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import time
from unittest.mock import Mock

import click
import pytest
from PIL import Image, PngImagePlugin

from safelight import media
from safelight.cli.main import cli, main
from safelight.errors import SafelightError
from safelight.runtime import logs
from safelight.runtime.logs import Formatter, PerCause, printable

HOSTILE = ["\x1b]0;owned\x07", "\x1b[2J", "\x9b31m", "a\rb", "\u202egnp", "\x00", "a\x08b", "\udc9b"]


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_what_a_terminal_obeys_is_shown(text):
    assert printable(text).isprintable() and printable(printable(text)) == printable(text)
    record = logging.LogRecord("a", logging.ERROR, "", 0, "of %s", (text,), None)
    assert Formatter("%(name)s: %(message)s").format(record).isprintable()


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_an_error_of_a_command_is_shown_and_not_obeyed(monkeypatch, capsys, text):
    """Whichever error it is, and whatever wrote its message."""
    for error in (SafelightError(f"of {text}"), click.UsageError(f"of {text}"), ValueError(f"of {text}")):
        monkeypatch.setattr(cli, "main", Mock(side_effect=error))
        with pytest.raises(SystemExit):
            main(["models"])
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("safelight: ") and line.isprintable()


def test_words_stay_as_they_are():
    assert printable("Käse 写真 😀", keep="\n") == "Käse 写真 😀" and printable("a\nb", keep="\n") == "a\nb"


@pytest.mark.parametrize("text", HOSTILE[:-1], ids=ascii)
def test_a_files_metadata_is_shown_and_not_obeyed(tmp_path, capsys, text):
    told = PngImagePlugin.PngInfo()
    told.add_text(media.METADATA_KEY, json.dumps({"prompt": text, text: "a\nmodel  forged"}))
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", pnginfo=told)
    for arguments in (["info", str(tmp_path / "a.png")], ["info", "--json", str(tmp_path / "a.png")], [f"x{text}"]):
        with pytest.raises(SystemExit):
            main(arguments)
        captured = capsys.readouterr()
        assert all(line.isprintable() for line in (captured.out + captured.err).split("\n")), captured
        assert "\nmodel  forged" not in captured.out


LIBRARIES = """
import logging, sys, warnings
from pathlib import Path
from safelight.core.server_args import ServerArgs
from safelight.runtime.worker import gpu_worker
from safelight.runtime.settings import EngineSettings
from safelight.runtime.logs import LIBRARIES, configure
from safelight.runtime.messages import Start
from safelight.runtime.unit_board import UnitBoard

class Channel:
    path = Path(sys.argv[1]) / "socket"

configure(logging.WARNING, "%(name)s: %(message)s")
process = gpu_worker.GPUWorker.__new__(gpu_worker.GPUWorker)
process.channel, process.board = Channel(), UnitBoard(Path(sys.argv[1]) / "board")
process._load(Start(EngineSettings(ServerArgs(device="cpu"), warm_up=False)))
assert {"diffusers", "transformers"} <= set(sys.modules)
for name in LIBRARIES:
    for number in range(50):
        logging.getLogger(f"{name}.tokenizers").warning(f"{number} words are cut: \\x1b[2J")
for number in range(50):
    warnings.warn("of a file: \\x9b31m", stacklevel=1)
"""


def test_libraries_log_as_we_do(tmp_path):
    """They have handlers of their own, and log the words of files and of prompts."""
    ended = subprocess.run(
        [sys.executable, "-c", LIBRARIES, str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    assert ended.returncode == 0, ended.stderr
    lines = ended.stderr.split("\n")
    assert all(line.isprintable() for line in lines), ended.stderr
    shown = [line for line in lines if "cut: \\x1b[2J" in line]
    assert {line.partition(".")[0] for line in shown} == set(logs.LIBRARIES)
    assert len(shown) == logs.PER_CAUSE * len(logs.LIBRARIES)
    assert any("\\x9b31m" in line for line in lines)


def failing(record_of, number, line=1):
    """Log as code of ours does: one cause with many words, once with an error."""
    try:
        raise OSError(f"number {number}")
    except OSError:
        return logging.LogRecord("a", logging.ERROR, "a.py", line, record_of, (number,), sys.exc_info())


def test_a_cause_fills_no_log(monkeypatch):
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    bounded = PerCause()
    shown = sum(bounded.filter(failing("job %s", number)) for number in range(10_000))
    assert shown == logs.PER_CAUSE
    assert not bounded.filter(failing("a client's words in its message, %s", 1))
    assert bounded.filter(failing("another cause, %s", 1, line=2)), "it does not hide others"
    assert bounded.filter(logging.LogRecord("a", logging.INFO, "", 0, "asked for", (), None))
    now += logs.SECONDS
    record = failing("job %s", 1)
    assert bounded.filter(record) and "9981 more" in record.getMessage()


def test_many_causes_are_not_kept_for_ever():
    bounded = PerCause()
    for number in range(5 * logs.MAX_CAUSES):
        bounded.filter(logging.LogRecord("a", logging.ERROR, "a.py", number, "a cause", (), None))
    assert len(bounded._seen) <= logs.MAX_CAUSES
