"""The store of jobs in SQLite, in the state directory. Imports no torch."""

from __future__ import annotations

import asyncio
import os
import sqlite3
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from safelight.errors import InvalidParameterError, StateDirectoryError, StorageError, StorageFailedError
from safelight.serving import directories
from safelight.serving.addresses import KEY_NAME
from safelight.serving.clocks import Clocks
from safelight.serving.jobs.job import Job, Kind, check_same, read_job
from safelight.serving.jobs.sqlite_errors import named_failures
from safelight.serving.jobs.store import MAX_PAGE, Horizon, JobStore, Kept, Order, Page, Usage, Waiting

T = TypeVar("T")

_VERSION = 1
_DATABASE, _LOCK = "jobs.sqlite3", "lock"
_BUSY_SECONDS = 0.5
"""For which SQLite waits by itself; whoever can wait longer tries again, and lets others to the store between."""
_SCHEMA = """
CREATE TABLE jobs (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    kind TEXT NOT NULL,
    owner TEXT NOT NULL,
    idempotency_key TEXT,
    state TEXT NOT NULL,
    attempts INTEGER NOT NULL,
    completed_at REAL,
    expires_at REAL,
    num_bytes INTEGER NOT NULL,
    record BLOB NOT NULL
);
CREATE UNIQUE INDEX jobs_by_key ON jobs (owner, idempotency_key) WHERE idempotency_key IS NOT NULL;
CREATE INDEX jobs_by_end ON jobs (state, completed_at);
"""
_LATER = (
    "CREATE TABLE IF NOT EXISTS removed (id TEXT PRIMARY KEY) WITHOUT ROWID",
    "CREATE TABLE IF NOT EXISTS leases "
    "(id INTEGER PRIMARY KEY AUTOINCREMENT, server TEXT NOT NULL UNIQUE, clock TEXT NOT NULL, until REAL NOT NULL)",
    "CREATE TABLE IF NOT EXISTS claims (job TEXT PRIMARY KEY, lease INTEGER NOT NULL) WITHOUT ROWID",
)
"""Tables of later versions: jobs that are no more and whose files may still be there; leases, whose numbers only go up;
and which lease holds an unfinished job. A version that does not know them is not disturbed."""
_ADDED = {"expires_clock": "TEXT", "expires_moment": "REAL", "turn": "INTEGER"}
"""Columns of a later version, which an earlier one leaves empty: when a job expires, by the clock that nobody sets, and
a number that goes up with every end: the order of ends, whatever the clock for people said."""
_BY_TURN = "CREATE INDEX IF NOT EXISTS jobs_by_turn ON jobs (turn)"
_NEXT_TURN = "UPDATE jobs SET turn = (SELECT coalesce(max(turn), 0) + 1 FROM jobs) WHERE id = :id"
_FIRST_ENDED = "turn, completed_at, number"
_COLUMNS = (
    *("id", "kind", "owner", "idempotency_key", "state", "attempts"),
    *("completed_at", "expires_at", "num_bytes", "record", "expires_clock", "expires_moment"),
)
_INSERT = f"INSERT INTO jobs ({', '.join(_COLUMNS)}) VALUES ({', '.join(f':{name}' for name in _COLUMNS)})"
_UPDATE = (
    f"UPDATE jobs SET {', '.join(f'{name} = :{name}' for name in _COLUMNS)} "
    "WHERE id = :id AND state = :old_state AND attempts = :old_attempts "
    "AND (SELECT lease FROM claims WHERE job = :id) IS :old_lease"
)
_JOBS = "jobs LEFT JOIN claims ON claims.job = jobs.id"
_FINISHED, _UNFINISHED = "state IN ('completed', 'failed')", "state IN ('queued', 'in_progress')"
_CLAIM = (
    f"INSERT INTO claims SELECT id, :lease FROM jobs WHERE id = :id AND {_UNFINISHED} "
    "AND EXISTS (SELECT 1 FROM leases WHERE id = :lease) ON CONFLICT DO NOTHING"
)
_OVER = "clock != :clock OR until <= :now"
_UNCLAIM = "DELETE FROM claims WHERE job = :id"


def _row(job: Job) -> dict[str, Any]:
    """Return a job's columns: the whole of it as JSON, and beside it what is searched for."""
    expires = job.expires
    return {
        "expires_clock": expires and expires.clock,
        "expires_moment": expires and expires.seconds,
        "id": job.id,
        "kind": job.kind,
        "owner": job.owner,
        "idempotency_key": job.idempotency_key,
        "state": job.state,
        "attempts": job.attempts,
        "completed_at": job.completed_at,
        "expires_at": job.expires_at,
        "num_bytes": job.num_bytes,
        "record": job.record,
    }


class SqliteJobStore(JobStore):
    """Jobs in a SQLite file of the state directory, held by one server at a time.

    The one connection belongs to one thread. `synchronous=FULL` makes SQLite sync its log at every commit. Leases end
    by the machine's clock that nobody sets; when the machine starts, all have ended.
    """

    is_exclusive = True

    def __init__(self, directory: Path, clocks: Clocks | None = None) -> None:
        """Open the store, or make it; this waits for the disk, and is for before the event loop serves anybody.

        Raises:
            StateDirectoryError: if the directory cannot be written, is full, is held by another server, was written
                by a newer version, or is neither empty nor ours.

        """
        self._directory, self.where = directory, str(directory / _DATABASE)
        self._moment = (clocks or Clocks()).moment
        directories.check_ours("state directory", directory, _is_older)
        self._lock = directories.hold("state directory", directory, _LOCK)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="safelight-jobs")
        try:
            self._connection = self._thread.submit(_connect, directory / _DATABASE).result()
            opened = (directory / _DATABASE).stat()
            self._identity = (opened.st_dev, opened.st_ino)
            directories.mark(directory)
        except OSError as error:
            self._let_go()
            raise StateDirectoryError(f"state directory {str(directory)!r} cannot be used: {error.strerror}") from error
        except BaseException:
            self._let_go()
            raise

    def _let_go(self) -> None:
        self._thread.shutdown()
        os.close(self._lock)

    async def add(self, job: Job) -> Job:
        return await self._call(self._add, job)

    async def get(self, job_id: str, owner: str | None = None) -> Job | None:
        where = "id = :id AND (:owner IS NULL OR owner = :owner)"
        return _first(await self._call(self._select, where, {"id": job_id, "owner": owner}))

    async def find(self, owner: str, idempotency_key: str) -> Job | None:
        return await self._call(self._find, owner, idempotency_key)

    async def page(
        self,
        kind: Kind | None = None,
        owner: str | None = None,
        after: str | None = None,
        limit: int = 20,
        order: Order = "desc",
    ) -> Page:
        if not 1 <= limit <= MAX_PAGE:
            raise InvalidParameterError("limit", limit, f"a whole number from 1 to {MAX_PAGE}")
        if order not in ("asc", "desc"):
            raise InvalidParameterError("order", order, "asc or desc")
        if after is not None and await self.get(after, owner) is None:
            raise InvalidParameterError("after", after, "the id of a job in this list")
        side = "<" if order == "desc" else ">"
        where = (
            "(:kind IS NULL OR kind = :kind) AND (:owner IS NULL OR owner = :owner) "
            f"AND (:after IS NULL OR number {side} (SELECT number FROM jobs WHERE id = :after)) "
            f"ORDER BY number {order} LIMIT :limit"
        )
        values = {"kind": kind, "owner": owner, "after": after, "limit": limit + 1}
        found = await self._call(self._select, where, values)
        return Page(found[:limit], len(found) > limit)

    async def replace(self, old: Job, new: Job) -> bool:
        assert old.id == new.id
        if not old.may_become(new):
            return False
        return await self._call(self._replace, old, new)

    async def delete(self, job_id: str) -> Job | None:
        return await self._call(self._delete, job_id)

    async def unfinished(self) -> list[Waiting]:
        columns = "id, attempts, lease IS NOT NULL"
        rows = await self._call(self._rows, f"SELECT {columns} FROM {_JOBS} WHERE {_UNFINISHED} ORDER BY number")
        return [Waiting(job_id, attempts, bool(is_claimed)) for job_id, attempts, is_claimed in rows]

    async def begin_lease(self, server: str, seconds: float) -> int:
        return await self._call(self._begin_lease, server, seconds)

    async def renew_lease(self, lease: int, seconds: float) -> frozenset[str] | None:
        return await self._call(self._renew_lease, lease, seconds)

    async def claim(self, job_id: str, lease: int) -> Job | None:
        return await self._call(self._claim, job_id, lease)

    async def check_writable(self) -> None:
        await self._call(self._write, f"PRAGMA user_version = {_VERSION}", {})  # which is written every time

    async def last_end(self) -> float | None:
        ((found,),) = await self._call(self._rows, "SELECT max(completed_at) FROM jobs")
        return None if found is None else float(found)

    async def expired(self, horizon: Horizon, limit: int = MAX_PAGE) -> list[Job]:
        by_stamp = "coalesce(expires_at <= :at OR (:knows_all AND completed_at > :at), FALSE)"
        is_expired = f"CASE WHEN expires_clock = :clock THEN expires_moment <= :seconds ELSE {by_stamp} END"
        where = f"{_FINISHED} AND {is_expired} ORDER BY {_FIRST_ENDED} LIMIT :limit"
        moment, others = horizon.moment, {"at": horizon.at, "knows_all": horizon.knows_all, "limit": limit}
        return await self._call(self._select, where, {"clock": moment.clock, "seconds": moment.seconds, **others})

    async def removable(self, limit: int = MAX_PAGE, failed_first: bool = False) -> list[Job]:
        order = "state = 'completed', " if failed_first else ""
        where = f"{_FINISHED} ORDER BY {order}{_FIRST_ENDED} LIMIT :limit"
        return await self._call(self._select, where, {"limit": limit})

    async def usage(self) -> Usage:
        totals = f"total(num_bytes), total(num_bytes) FILTER (WHERE {_FINISHED}), total(length(record))"
        (row,) = await self._call(self._rows, f"SELECT {totals} FROM jobs")
        return Usage(*map(int, row))

    async def kept(self, job_ids: Collection[str]) -> dict[str, Kept]:
        return await self._call(self._kept, tuple(job_ids))

    async def announce(self, job_id: str) -> None:
        await self._call(self._write, "INSERT OR IGNORE INTO removed VALUES (:id)", {"id": job_id})

    async def forget(self, but: Collection[str]) -> None:
        await self._call(self._forget, frozenset(but))

    async def close(self) -> None:
        await self._call(self._connection.close)
        self._let_go()

    async def _call(self, function: Callable[..., T], *args: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *args)

    def _transaction(self) -> AbstractContextManager[None]:
        """Begin a change, unless the file has lost its name, and what is written into it is lost."""
        with suppress(OSError):
            found = (self._directory / _DATABASE).stat()
            if (found.st_dev, found.st_ino) == self._identity:
                return _transaction(self._connection, self._directory)
        raise StorageFailedError("the jobs' database is gone from the state directory; start the server again")

    def _add(self, job: Job) -> Job:
        with self._transaction():
            existing = self._find(job.owner, job.idempotency_key) if job.idempotency_key is not None else None
            if existing is not None:
                return check_same(existing, job.digest)
            self._connection.execute(_INSERT, _row(job))
            claimed = self._connection.execute(_CLAIM, {"id": job.id, "lease": job.lease}).rowcount == 1
            self._connection.execute("DELETE FROM removed WHERE id = :id", {"id": job.id})
        return job if claimed or job.lease is None else msgspec.structs.replace(job, lease=None)

    def _find(self, owner: str, idempotency_key: str) -> Job | None:
        where = "owner = :owner AND idempotency_key = :key"
        return _first(self._select(where, {"owner": owner, "key": idempotency_key}))

    def _replace(self, old: Job, new: Job) -> bool:
        with self._transaction():
            before = {"old_state": old.state, "old_attempts": old.attempts, "old_lease": old.lease}
            done = self._connection.execute(_UPDATE, {**_row(new), **before}).rowcount == 1
            if done and new.finished:
                self._connection.execute(_NEXT_TURN, {"id": new.id})
                self._connection.execute(_UNCLAIM, {"id": new.id})
        return done

    def _begin_lease(self, server: str, seconds: float) -> int:
        now = self._moment()
        values = {"server": server, "clock": now.clock, "now": now.seconds, "until": now.seconds + seconds}
        with self._transaction():
            self._give_up(f"server = :server OR {_OVER}", values)
            inserted = "INSERT INTO leases (server, clock, until) VALUES (:server, :clock, :until) RETURNING id"
            (lease,) = self._connection.execute(inserted, values).fetchone()
        return int(lease)

    def _renew_lease(self, lease: int, seconds: float) -> frozenset[str] | None:
        now = self._moment()
        values = {"id": lease, "clock": now.clock, "now": now.seconds, "until": now.seconds + seconds}
        with self._transaction():
            renewal = "UPDATE leases SET clock = :clock, until = :until WHERE id = :id"
            renewed = self._connection.execute(renewal, values).rowcount == 1
            self._give_up(_OVER, values)
            held = self._connection.execute("SELECT job FROM claims WHERE lease = :id", values).fetchall()
        return frozenset(job_id for (job_id,) in held) if renewed else None

    def _give_up(self, which: str, values: Mapping[str, Any]) -> None:
        """End leases, and let their jobs be claimed anew; within a transaction."""
        self._connection.execute(f"DELETE FROM claims WHERE lease IN (SELECT id FROM leases WHERE {which})", values)
        self._connection.execute(f"DELETE FROM leases WHERE {which}", values)

    def _claim(self, job_id: str, lease: int) -> Job | None:
        with self._transaction():
            done = self._connection.execute(_CLAIM, {"id": job_id, "lease": lease}).rowcount == 1
        return _first(self._select("id = :id", {"id": job_id})) if done else None

    def _delete(self, job_id: str) -> Job | None:
        with self._transaction():
            found = _first(self._select("id = :id", {"id": job_id}))
            if found is not None:
                self._connection.execute("DELETE FROM jobs WHERE id = :id", {"id": job_id})
                self._connection.execute(_UNCLAIM, {"id": job_id})
                self._connection.execute("INSERT OR IGNORE INTO removed VALUES (:id)", {"id": job_id})
        return found

    def _forget(self, but: frozenset[str]) -> None:
        known = [job_id for (job_id,) in self._rows("SELECT id FROM removed")]
        if forgotten := [(job_id,) for job_id in known if job_id not in but]:
            with self._transaction():
                self._connection.executemany("DELETE FROM removed WHERE id = ?", forgotten)

    def _named_failures(self) -> AbstractContextManager[None]:
        return named_failures(self._directory)

    def _write(self, statement: str, values: Mapping[str, Any]) -> None:
        with self._transaction():
            self._connection.execute(statement, values)

    def _rows(self, query: str) -> list[Any]:
        with self._named_failures():
            return self._connection.execute(query).fetchall()

    def _select(self, where: str, values: Mapping[str, Any]) -> list[Job]:
        with self._named_failures():
            rows = self._connection.execute(f"SELECT record, lease FROM {_JOBS} WHERE {where}", values)
            found = [(read_job(record), lease) for record, lease in rows]
            return [msgspec.structs.replace(job, lease=lease) for job, lease in found]

    def _kept(self, job_ids: tuple[str, ...]) -> dict[str, Kept]:
        """Read one record after the other, and keep of each its files alone: there may be many, and large ones."""
        among = f"({', '.join('?' * len(job_ids))})"
        with self._named_failures():
            removed = self._connection.execute(f"SELECT id FROM removed WHERE id IN {among}", job_ids)
            found = {job_id: Kept(is_over=True) for (job_id,) in removed}
            rows = self._connection.execute(f"SELECT id, {_FINISHED}, record FROM jobs WHERE id IN {among}", job_ids)
            for job_id, is_over, record in rows:
                names = frozenset(file.name for file in read_job(record).files)
                found[job_id] = Kept(bool(is_over), names)
        return found


def _first(jobs: list[Job]) -> Job | None:
    return jobs[0] if jobs else None


@contextmanager
def _transaction(connection: sqlite3.Connection, folder: Path) -> Iterator[None]:
    """Commit what is done inside, or nothing of it."""
    with named_failures(folder):
        try:
            connection.execute("BEGIN IMMEDIATE")
            yield
            connection.execute("COMMIT")
        finally:
            if connection.in_transaction:
                with suppress(sqlite3.DatabaseError):  # the disk fails: what matters has been raised
                    connection.execute("ROLLBACK")


def _is_older(names: frozenset[str]) -> bool:
    """Say whether an older version made a state directory with such names in it, or died as it began to."""
    return _DATABASE in names or names <= {_LOCK, KEY_NAME}


def _connect(path: Path) -> sqlite3.Connection:
    try:
        path.touch(mode=directories.PRIVATE)
        for name in (path.name, f"{path.name}-wal", f"{path.name}-shm", _LOCK):
            directories.make_private(path.with_name(name))
        connection = sqlite3.connect(path, isolation_level=None, timeout=_BUSY_SECONDS)
        try:
            with named_failures(path.parent):
                _prepare(connection, path)
        except BaseException:
            connection.close()
            raise
    except (OSError, sqlite3.Error, StorageError) as error:
        message = f"state directory {str(path.parent)!r} cannot be used: {path.name}: {error}"
        raise StateDirectoryError(message) from error
    return connection


def _prepare(connection: sqlite3.Connection, path: Path) -> None:
    """Bring the file to this version's form. The version is written every time: a full disk shows at the start."""
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version > _VERSION:
        message = f"{path.name} is of version {version}, and this Safelight knows {_VERSION}; use a newer one"
        raise StateDirectoryError(f"state directory {str(path.parent)!r}: {message}")
    (num_tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    if version == 0 and num_tables:
        message = f"{path.name} is another program's database; name another folder"
        raise StateDirectoryError(f"state directory {str(path.parent)!r} cannot be used: {message}")
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA wal_autocheckpoint = 64")  # pages of 4 KiB: the log stays small beside small disks
    with _transaction(connection, path.parent):
        if version == 0:
            for statement in _SCHEMA.split(";"):
                connection.execute(statement)
        for statement in _LATER:
            connection.execute(statement)
        columns = {name for _, name, *_ in connection.execute("PRAGMA table_info(jobs)")}
        for name, kind in _ADDED.items():
            if name not in columns:
                connection.execute(f"ALTER TABLE jobs ADD COLUMN {name} {kind}")
        connection.execute(_BY_TURN)
        connection.execute(f"SELECT {', '.join(_COLUMNS)} FROM jobs LIMIT 0")
        connection.execute(f"PRAGMA user_version = {_VERSION}")
