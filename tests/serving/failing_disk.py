"""A disk that fails in the middle of its work: the C library's calls on paths below a folder, in processes that ask."""

from __future__ import annotations

import errno
import mmap
import os
import shutil
import struct
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

OPERATIONS = {"write": 1, "sync": 2, "truncate": 4, "rename": 8, "unlink": 16, "open": 32, "read": 64}
CHANGES = ("write", "sync", "truncate", "rename", "unlink")
SHORT = 0
"""Instead of an error's number: half of each write is done."""
ERRORS = {"EIO": errno.EIO, "ENOSPC": errno.ENOSPC, "EROFS": errno.EROFS, "EDQUOT": errno.EDQUOT, "short": SHORT}
FOREVER = 1 << 60
_FORM = struct.Struct("=6q")
_SOURCE = Path(__file__).with_suffix(".c")


class FailingDisk:
    """Everything below a folder, for processes with the environment of this object.

    Args:
        folder: whose files fail.
        place: for what this needs itself; not below it.

    """

    def __init__(self, folder: Path, place: Path) -> None:
        compiler = shutil.which("cc") or shutil.which("gcc")
        if compiler is None:
            pytest.skip("there is no C compiler to make a failing disk with")
        folder.mkdir(exist_ok=True)
        place.mkdir(exist_ok=True)
        library, control = place / "failing_disk.so", place / "control"
        command = [compiler, "-O1", "-shared", "-fPIC", "-o", str(library), str(_SOURCE), "-ldl"]
        subprocess.run(command, check=True, timeout=60)
        control.write_bytes(bytes(_FORM.size))
        self._open(control)
        self.environment: Mapping[str, str] = {
            **os.environ,
            "LD_PRELOAD": str(library),
            "FAILING_DISK_CONTROL": str(control),
            "FAILING_DISK_FOLDER": str(folder),
        }

    @classmethod
    def of_this_process(cls) -> FailingDisk:
        """Return the disk that this process runs on, to be told by it when to fail."""
        disk = cls.__new__(cls)
        disk.environment = os.environ
        disk._open(Path(os.environ["FAILING_DISK_CONTROL"]))
        return disk

    def _open(self, control: Path) -> None:
        with control.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), _FORM.size)

    def fail(self, operations: tuple[str, ...], error: int, after: int = 0, count: int = FOREVER) -> None:
        """Let calls of these kinds fail from the next but `after` on."""
        self._map[:] = _FORM.pack(sum(OPERATIONS[name] for name in operations), error, after, count, 0, 0)

    def count(self, operations: tuple[str, ...]) -> None:
        """Count calls of these kinds, from here on."""
        self.fail(operations, errno.EIO, FOREVER)

    def heal(self) -> int:
        """Let everything be well again, and return how many of the calls came."""
        calls = int(_FORM.unpack(self._map[:])[4])
        self._map[:] = bytes(_FORM.size)
        return calls
