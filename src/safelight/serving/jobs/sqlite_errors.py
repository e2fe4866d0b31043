"""What SQLite says of a disk that fails, or of another program, as our errors. Imports no torch."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safelight.errors import StorageBusyError, StorageError, StorageFailedError, StorageFullError
from safelight.serving import directories

_HELD = "another program holds the jobs' database; try again later"
_FAILURES: tuple[tuple[tuple[str, ...], type[StorageError], str], ...] = (
    (("SQLITE_FULL",), StorageFullError, "the state directory is full"),
    (("SQLITE_BUSY", "SQLITE_LOCKED", "SQLITE_PROTOCOL"), StorageBusyError, _HELD),
    (("SQLITE_CORRUPT", "SQLITE_NOTADB"), StorageFailedError, "the jobs' database is damaged"),
    (("SQLITE_READONLY",), StorageFailedError, "the jobs' database cannot be written any more"),
    (("SQLITE_IOERR",), StorageFailedError, "the jobs' database: the disk fails"),
    (("SQLITE_CANTOPEN",), StorageFailedError, "the jobs' database cannot be opened any more"),
)
"""What SQLite's names begin with, and what it is to a client."""
_UNNAMED = ("SQLITE_IOERR_WRITE", "SQLITE_IOERR_SHMSIZE")
"""Of these it does not say whether the disk fails or a quota is at its end."""


@contextmanager
def named_failures(folder: Path) -> Iterator[None]:
    """Turn what SQLite says of the disk, or of another program that holds the file, into our errors."""
    try:
        yield
    except (sqlite3.OperationalError, sqlite3.DatabaseError) as error:
        name = getattr(error, "sqlite_errorname", "")  # Python's own, of a closed connection for example, have none
        for beginnings, cls, message in _FAILURES:
            if name.startswith(beginnings):
                raise (_unnamed(folder) if name in _UNNAMED else cls(message)) from error
        raise


def _unnamed(folder: Path) -> StorageError:
    """Find out why nothing can be written, by writing."""
    try:
        directories.probe(folder)
    except OSError as error:
        return StorageError.of(error, "the jobs' database")
    return StorageFailedError("the jobs' database: the disk fails")
