"""What a package says of values that it cannot run, as an answer may repeat it."""

from __future__ import annotations

import re

import torch

from safelight.errors import PackageError, SafelightError, without_objects

MAX_LENGTH = 240
"""Characters of what the package says that an error repeats."""
_READ = 8192
"""Characters of it that are looked at: it may repeat a prompt."""
_TRACEBACK = "Traceback (most recent call last):"
_OTHERS = (SafelightError, MemoryError, OSError, torch.OutOfMemoryError, torch.AcceleratorError)
"""What has nothing to do with the values: it keeps its own name."""
_OF_THE_DEVICE = re.compile(r"CUDA|cuDNN|CUBLAS|HIP|NCCL|out of memory|can't allocate memory", re.IGNORECASE)
_INTERNALS = (
    (re.compile(r"\bat 0x[0-9a-fA-F]+|\b0x[0-9a-fA-F]+"), ""),
    (re.compile(r"(?:[A-Za-z]:)?[/\\][\w.+@-]+(?:[/\\][\w.+@-]+)+"), "a file"),
    (re.compile(r"\b(?:torch|diffusers|transformers|numpy|safelight)\.(?:\w+\.)*"), ""),
)


def refusal(pipeline_name: str, error: Exception) -> Exception:
    """Return what an error in a pipeline's call is: of the values that it was given, or else what it was.

    These pipelines check some values, and say what is wrong with them. Others they use unchecked, to the first
    operation that cannot be done. A value that no operation can use is a user's mistake either way, and the package's
    words are the best that there are.
    """
    if isinstance(error, _OTHERS) or _OF_THE_DEVICE.search(str(error)):
        return error
    said = one_line(str(error)) or "an operation failed"
    kind = "" if type(error) is ValueError else f" ({type(error).__name__})"
    return PackageError(f"{pipeline_name} cannot run these values: {said}{kind}")


def one_line(text: str) -> str:
    """Return a message in one line of bounded length, without addresses, files and modules of this process."""
    text = without_objects(text[:_READ].partition(_TRACEBACK)[0], _class_name)
    for pattern, instead in _INTERNALS:
        text = pattern.sub(instead, text)
    line = " ".join(text.split())
    return line if len(line) <= MAX_LENGTH else f"{line[: MAX_LENGTH - 1]}…"


def _class_name(inside: str) -> str:
    """Return the name at the beginning of an object's representation."""
    end = next((at for at, letter in enumerate(inside) if not (letter.isalnum() or letter in "._")), len(inside))
    return inside[:end]
