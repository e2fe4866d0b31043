"""What a terminal or a log is shown: no control of it comes from data, and one cause fills it no more than so far.

Imports no torch.
"""

from __future__ import annotations

import logging
import sys
import time
from contextlib import suppress

PER_CAUSE, SECONDS = 20, 60.0
"""Records of one cause within so many seconds; what is more is counted, and told with the next one."""
MAX_CAUSES = 1000

LIBRARIES = ("accelerate", "diffusers", "huggingface_hub", "transformers")
"""Which have handlers of their own, and log words of files and of clients, as of a prompt that is cut."""

Cause = tuple[str, int, str, int, str]


def printable(text: str, keep: str = "") -> str:
    """Return text with every character that a terminal would obey, or not show, as its escape; `keep` stays."""
    return "".join(
        character
        if character.isprintable() or character in keep
        else character.encode("unicode_escape", "surrogatepass").decode("ascii")
        for character in text
    )


def tell(line: str) -> None:
    """Write a line to standard error, as far as there is room for it: nothing ends because nobody can be told."""
    with suppress(OSError, ValueError):  # ValueError: it is closed
        print(printable(line), file=sys.stderr, flush=True)


class Formatter(logging.Formatter):
    """Shows what a terminal would obey."""

    def format(self, record: logging.LogRecord) -> str:
        """Return a record's text, of one line or, with a traceback, of several."""
        return printable(super().format(record), keep="\n\t")


class PerCause(logging.Filter):
    """Lets some records of each cause pass within a time: of one logger, level, line of code, and kind of error.

    Of the line and not of its message: into that some libraries write what a client said.
    """

    def __init__(self) -> None:
        super().__init__()
        self._seen: dict[Cause, tuple[float, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Say whether a record is shown; the first of a time says how many were not."""
        if record.levelno < logging.WARNING:
            return True
        error = record.exc_info[0].__name__ if record.exc_info and record.exc_info[0] else ""
        cause = (record.name, record.levelno, record.pathname, record.lineno, error)
        now = time.monotonic()
        if cause not in self._seen and len(self._seen) >= MAX_CAUSES:
            self._seen.clear()
        begun, count = self._seen.get(cause, (now, 0))
        if now - begun >= SECONDS:
            if count > PER_CAUSE:
                record.msg, record.args = f"{record.getMessage()} (and {count - PER_CAUSE} more before)", ()
            begun, count = now, 0
        self._seen[cause] = (begun, count + 1)
        return count < PER_CAUSE


def configure(level: int, form: str) -> None:
    """Let this process's log go to standard error so."""
    handler = logging.StreamHandler()
    handler.setFormatter(Formatter(form))
    handler.addFilter(PerCause())
    logging.basicConfig(level=level, handlers=[handler])


def adopt_libraries() -> None:
    """Let what libraries say go where this process's log goes, once they are imported; for a process of ours."""
    logging.captureWarnings(True)
    for name in LIBRARIES:
        library = logging.getLogger(name)
        for handler in list(library.handlers):
            library.removeHandler(handler)
        library.propagate = True
