"""How Safelight starts processes of its own: from the packages that are installed, never from the folder it is run in.

`python -m` puts the working directory before everything else that modules are looked for in, and so does an empty
entry of `PYTHONPATH`. Whoever starts a server in a downloaded folder would run its `torch.py`. Imports no torch.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

SAFE_PATH = "PYTHONSAFEPATH"
"""By which Python is told what `-P` tells it; what a process of ours starts is told so too, as by Inductor."""
PATH = "PYTHONPATH"


@contextmanager
def uncollected() -> Iterator[None]:
    """Make what stays to the process's end, as imports do: Python's collector looks at none of it, now or later.

    A process that imports torch and ends takes 0.9 seconds of the processor so, and 1.4 otherwise.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()


def python_command(module: str, *arguments: str) -> list[str]:
    """Return the command line of a module of ours in a process of its own."""
    return [sys.executable, "-P", "-m", module, *arguments]


def safe_environment() -> dict[str, str]:
    """Return this process's environment, in which no Python looks for modules in its working directory."""
    known = {**os.environ, SAFE_PATH: "1"}
    entries = [entry for entry in known.pop(PATH, "").split(os.pathsep) if entry]
    if entries:
        known[PATH] = os.pathsep.join(entries)
    return known


def guard_children() -> None:
    """Let what this process starts from now on, whoever does, look for no modules in its working directory."""
    known = safe_environment()
    os.environ.pop(PATH, None)
    os.environ.update(known)
