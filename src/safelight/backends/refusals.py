"""What a package says of values that it cannot run, as an answer may repeat it."""

from __future__ import annotations

import re

import torch

from safelight.errors import PackageError, SafelightError

MAX_LENGTH = 240
"""Characters of what the package says that an error repeats."""
_OTHERS = (SafelightError, MemoryError, OSError, torch.OutOfMemoryError, torch.AcceleratorError)
"""What has nothing to do with the values: it keeps its own name."""
_OF_THE_DEVICE = re.compile(r"CUDA|cuDNN|CUBLAS|HIP|NCCL|out of memory|can't allocate memory", re.IGNORECASE)
_INTERNALS = (
    (re.compile(r"Traceback \(most recent call last\):.*", re.DOTALL), ""),
    (re.compile(r"<([\w.]*)[^<>]* at 0x[0-9a-fA-F]+>"), r"\1"),
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
    for pattern, instead in _INTERNALS:
        text = pattern.sub(instead, text)
    line = " ".join(text.split())
    return line if len(line) <= MAX_LENGTH else f"{line[: MAX_LENGTH - 1]}…"
