"""Videos on their way between two processes: in a file, of which one frame at a time is in memory. Imports no torch."""

from __future__ import annotations

import errno
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from safelight.errors import StorageError
from safelight.runtime.sockets import require_private

SPOOLED_BYTES = 8 << 20
"""From which on an array goes through a file: a video; whoever encodes it never holds it whole."""


_NAME = re.compile(rb"[0-9a-f]{16}\.frames")


def spool(array: memoryview, folder: Path) -> bytes:
    """Write an array's bytes into a new file in a folder, and return its name.

    Raises:
        StorageError: if that cannot be done; no file is left where the disk lets it go.

    """
    path = folder / f"{secrets.token_hex(8)}.frames"
    try:
        require_private(folder)
        with path.open("xb", buffering=0) as file:
            while array:
                array = array[file.write(array) :]
    except OSError as error:
        with suppress(OSError):
            path.unlink()
        raise StorageError.of(error, "the video on its way to be encoded") from error
    return path.name.encode()


def spooled(name: bytes, folder: Path) -> SpooledFrames:
    """Open a file that `spool` wrote into a folder.

    Raises:
        ValueError: for any other name.
        OSError: if there is no such file, it is a link, or others may look into the folder.

    """
    if _NAME.fullmatch(name) is None:
        raise ValueError("not the name of a file of frames")
    require_private(folder)
    return SpooledFrames(folder / name.decode())


class SpooledFrames:
    """A video [T, H, W, C] of uint8 in a file that has no name any more: it is gone with this object.

    Args:
        path: of the file, which is unlinked at once.

    """

    def __init__(self, path: Path) -> None:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        self._file = os.fdopen(descriptor, "rb", buffering=0)
        path.unlink()
        self.shape: tuple[int, ...] = (os.fstat(self._file.fileno()).st_size,)

    def view(self, dtype: np.dtype[Any]) -> SpooledFrames:
        """Return itself: its bytes are always uint8."""
        assert dtype == np.uint8
        return self

    def reshape(self, shape: tuple[int, ...]) -> SpooledFrames:
        """Say what the bytes are.

        Raises:
            ValueError: if there are not as many.

        """
        if np.prod(shape) != np.prod(self.shape):
            raise ValueError(f"{self.shape} is not {shape}")
        self.shape = shape
        return self

    def __len__(self) -> int:
        """Return the number of frames."""
        return self.shape[0]

    def __getitem__(self, index: int) -> NDArray[np.uint8]:
        """Read a frame, [H, W, C]."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        size = int(np.prod(self.shape[1:]))
        data = os.pread(self._file.fileno(), size, index * size)
        if len(data) != size:
            raise OSError(errno.EIO, "the file of frames is shorter than it was")
        return np.frombuffer(data, np.uint8).reshape(self.shape[1:])

    def __iter__(self) -> Iterator[NDArray[np.uint8]]:
        """Read one frame after another."""
        return (self[index] for index in range(len(self)))
