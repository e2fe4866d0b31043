"""Bytes of a request, or of its answer, that wait in a file: what is large costs disk, and no memory. No torch.

A spool's file has no name, and is gone with the last who refers to it. A process that dies leaves nothing.
"""

from __future__ import annotations

import errno
import os
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path

from safelight.errors import QueueFullError, StorageFullError
from safelight.serving.http.pieces import PIECE, pieces, turn

IN_MEMORY = 1 << 16
"""Bytes of a spool that stay in memory where that has room; what is longer is in its file."""
_SHOWN = 1000
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_TOO_MANY = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


class Spool:
    """Bytes one after another, in memory at first. One thread at a time writes; any may read what has been written.

    Args:
        directory: where its file is, once there is one.

    Attributes:
        num_bytes: all that was written.

    """

    def __init__(self, directory: Path) -> None:
        self.num_bytes = 0
        self._directory, self._data = directory, bytearray()
        self._file: int | None = None

    @property
    def in_file(self) -> bool:
        """Whether it has a file."""
        return self._file is not None

    def keep(self, data: bytes) -> None:
        """Add bytes in memory. Where there is a file, nothing is read before the next `flush`."""
        self._data += data
        self.num_bytes += len(data)

    def flush(self) -> None:
        """Move what is in memory into the file. This waits for the disk: for a thread.

        Raises:
            StorageFullError: if there is no room.
            QueueFullError: if as many files are open as may be.

        """
        try:
            if self._file is None:
                with tempfile.TemporaryFile(dir=self._directory, buffering=0) as file:
                    self._file = os.dup(file.fileno())
                weakref.finalize(self, os.close, self._file)
            left, at = memoryview(self._data), self.num_bytes - len(self._data)
            while left:
                written = os.pwrite(self._file, left, at)
                left, at = left[written:], at + written
        except OSError as error:
            if error.errno in _FULL:
                raise StorageFullError("there is no room on the disk for what is being received") from error
            if error.errno in _TOO_MANY:
                raise QueueFullError("as many files are open as may be; try again later") from error
            raise
        self._data = bytearray()

    def read_at(self, begin: int, length: int) -> bytes:
        """Return the bytes that are there."""
        if self._file is None:
            return bytes(self._data[begin : begin + length])
        return os.pread(self._file, length, begin)

    def all(self) -> Stored:
        """Return what has been written until now."""
        return Stored(self, 0, self.num_bytes)

    def add(self, data: bytes) -> Stored:
        """Add bytes, in memory or in the file, and return where they are. For a thread."""
        self.keep(data)
        if self.in_file or self.num_bytes > IN_MEMORY:
            self.flush()
        return Stored(self, self.num_bytes - len(data), len(data))

    def store(self, parts: Iterator[bytes]) -> Stored:
        """Write parts one after another, and return where they are. For a thread."""
        begin = self.num_bytes
        for data in parts:
            self.keep(data)
            self.flush()
        return Stored(self, begin, self.num_bytes - begin)


class Stored:
    """A stretch of a spool, which stays as long as this does.

    Args:
        spool: whose bytes they are.
        begin, length: where.

    """

    def __init__(self, spool: Spool, begin: int, length: int) -> None:
        self.spool, self.begin, self.length = spool, begin, length

    def __len__(self) -> int:
        """Return the number of bytes."""
        return self.length

    def head(self, length: int) -> bytes:
        """Return the first bytes."""
        return self.spool.read_at(self.begin, min(length, self.length))

    def pieces(self, begin: int = 0, size: int = PIECE) -> Iterator[bytes]:
        """Yield the bytes from `begin` on in pieces, with a turn for the event loop after each."""
        for at in range(begin, self.length, size):
            if at > begin:
                turn()
            yield self.spool.read_at(self.begin + at, min(size, self.length - at))

    def read(self) -> bytes:
        """Return all bytes."""
        return self.spool.read_at(self.begin, self.length)

    def buffer(self) -> bytearray:
        """Return a copy of all bytes that can be searched."""
        found, at = bytearray(self.length), 0
        for piece in self.pieces():
            found[at : at + len(piece)] = piece
            at += len(piece)
        return found


def parts(data: bytes | Stored) -> Iterator[bytes]:
    """Yield bytes in pieces, wherever they are, with a turn for the event loop after each."""
    return pieces(data) if isinstance(data, bytes) else data.pieces()


class LongText(Stored):
    """A text of a client's that is longer than any field takes, but for a picture's data URL. It is UTF-8."""

    def __repr__(self) -> str:
        """Show how it begins."""
        return repr(self.start)

    @property
    def start(self) -> str:
        """How it begins."""
        return self.head(_SHOWN).decode("utf-8", "ignore")
