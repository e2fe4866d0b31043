"""What SQLite says of a disk has a name of ours, and a mistake of ours keeps its own."""

from __future__ import annotations

import sqlite3

import pytest

from safelight.errors import StorageBusyError, StorageFailedError, StorageFullError
from safelight.serving.jobs.sqlite_errors import named_failures

CODES = {
    "SQLITE_IOERR_FSYNC": StorageFailedError,
    "SQLITE_IOERR_READ": StorageFailedError,
    "SQLITE_IOERR_WRITE": StorageFailedError,
    "SQLITE_CORRUPT": StorageFailedError,
    "SQLITE_CORRUPT_INDEX": StorageFailedError,
    "SQLITE_NOTADB": StorageFailedError,
    "SQLITE_READONLY": StorageFailedError,
    "SQLITE_READONLY_DBMOVED": StorageFailedError,
    "SQLITE_CANTOPEN": StorageFailedError,
    "SQLITE_FULL": StorageFullError,
    "SQLITE_BUSY_SNAPSHOT": StorageBusyError,
    "SQLITE_LOCKED": StorageBusyError,
}


@pytest.mark.parametrize("name", CODES)
def test_what_sqlite_says_has_a_name(tmp_path, name):
    error = sqlite3.OperationalError("it says so")
    error.sqlite_errorname = name
    with pytest.raises(CODES[name]) as found, named_failures(tmp_path):
        raise error
    assert found.value.status in (503, 507) and str(tmp_path) not in str(found.value)


def test_a_mistake_of_ours_keeps_its_name(tmp_path):
    with pytest.raises(sqlite3.OperationalError), named_failures(tmp_path):
        sqlite3.connect(":memory:").execute("SELECT nothing FROM nowhere")
    with pytest.raises(sqlite3.ProgrammingError), named_failures(tmp_path):
        connection = sqlite3.connect(":memory:")
        connection.close()
        connection.execute("SELECT 1")
