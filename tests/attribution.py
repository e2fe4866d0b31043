"""Whose a library's warning about its own future is.

It is ours, and fails a test, only where it names something that we call. Python attributes a warning by a number of
frames that the library counts, which goes wrong in two ways: a decorator stands between the function and its caller
(`torch.no_grad` around what is deprecated), or a helper warns of its caller's argument and counts no further. So a
warning that would be attributed to a decorator, or to a library's function that it names, goes to that function's
caller. The filters in `pyproject.toml` then tell our modules from others.
"""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Callable
from types import FrameType
from typing import Any

WRAPPERS = frozenset({"contextlib", "functools", "torch.utils._contextlib", "typing_extensions", "warnings"})
"""Modules whose frames stand between a function and whoever called it."""


STRICT = tuple(
    part
    for rule in (
        "error",
        "ignore::DeprecationWarning",
        "ignore::PendingDeprecationWarning",
        "ignore::FutureWarning",
        "error:::__main__",
    )
    for part in ("-W", rule)
)
"""Python's options for a process that runs a user's own code: the same rule, where that code stands for ours."""


def module_of(frame: FrameType) -> str:
    """Return the name of the module that a frame runs."""
    return str(frame.f_globals.get("__name__", ""))


def names(frame: FrameType, text: str) -> bool:
    """Return whether a text names a frame's function, its object's class, or an argument that it takes."""
    code = frame.f_code
    count = code.co_argcount + code.co_kwonlyargcount
    known = {code.co_name, *code.co_varnames[:count]} - {"self", "cls"}
    for value in (frame.f_locals.get(name) for name in code.co_varnames[: count + 2]):
        known |= set(value) if type(value) is dict else {type(value).__name__}
    return bool(known & set(re.findall(r"\w+", text)))


def depth(warning: FrameType, stacklevel: int, text: str) -> int:
    """Return the number of frames from the one that warns to the one that the warning is of, as `stacklevel` counts.

    Args:
        warning: the frame that warns.
        stacklevel: as it counts.
        text: the warning's.

    """
    frame: FrameType | None = warning
    for _ in range(stacklevel - 1):
        frame = frame.f_back if frame is not None else None
    if frame is None:
        return stacklevel
    if module_of(frame) not in WRAPPERS:
        if not names(frame, text):
            return stacklevel
        frame, stacklevel = frame.f_back, stacklevel + 1
    while frame is not None and module_of(frame) in WRAPPERS:
        frame, stacklevel = frame.f_back, stacklevel + 1
    return stacklevel


def attributing(original: Callable[..., None]) -> Callable[..., None]:
    """Return `warnings.warn` with what is said above."""

    def warn(message: Any, category: Any = None, stacklevel: int = 1, source: Any = None, **details: Any) -> None:
        found = depth(sys._getframe(1), stacklevel, str(message))
        original(message, category, found + 1, source, **details)

    return warn


def attribute() -> None:
    """Attribute the warnings of this process, once."""
    if warnings.warn.__module__ != __name__:
        warnings.warn = attributing(warnings.warn)
