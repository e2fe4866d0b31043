"""The store of jobs in SQLite, in the state directory. Imports no torch."""

from __future__ import annotations

import asyncio
import json
import os
import sqlite3
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from safelight.errors import InvalidParameterError, StateDirectoryError, StorageError, StorageFailedError
from safelight.serving import directories
from safelight.serving.addresses import KEY_NAME
from safelight.serving.clocks import Clocks
from safelight.serving.jobs.job import Job, Kind, check_same, read_job
from safelight.serving.jobs.sqlite_errors import named_failures
from safelight.serving.jobs.store import MAX_PAGE, Horizon, JobStore, Kept, Order, Page, Unclaimed, Usage

T = TypeVar("T")

_VERSION = 1
_DATABASE, _LOCK = "jobs.sqlite3", "lock"
_BUSY_SECONDS = 0.5
"""For which SQLite waits by itself; whoever can wait longer tries again, and lets others to the store between."""
_COLUMNS: Mapping[str, tuple[str, Callable[[Job], Any]]] = {
    "id": ("TEXT NOT NULL UNIQUE", lambda job: job.id),
    "kind": ("TEXT NOT NULL", lambda job: job.kind),
    "owner": ("TEXT NOT NULL", lambda job: job.owner),
    "idempotency_key": ("TEXT", lambda job: job.idempotency_key),
    "state": ("TEXT NOT NULL", lambda job: job.state),
    "attempts": ("INTEGER NOT NULL", lambda job: job.attempts),
    "completed_at": ("REAL", lambda job: job.completed_at),
    "expires_at": ("REAL", lambda job: job.expires_at),
    "num_bytes": ("INTEGER NOT NULL", lambda job: job.num_bytes),
    "record": ("BLOB NOT NULL", lambda job: job.record),
    "expires_clock": ("TEXT", lambda job: job.expires and job.expires.clock),
    "expires_moment": ("REAL", lambda job: job.expires and job.expires.seconds),
}
"""What is kept of a job, of which type, and where it comes from: the whole of it as JSON, and what is searched for."""
_TYPES = {name: kind for name, (kind, _) in _COLUMNS.items()} | {"turn": "INTEGER"}
"""A turn is a number that goes up with every end: the order of ends, whatever the clock for people said."""
_TABLES = (
    f"jobs (number INTEGER PRIMARY KEY AUTOINCREMENT, {', '.join(f'{name} {kind}' for name, kind in _TYPES.items())})",
    "removed (id TEXT PRIMARY KEY) WITHOUT ROWID",
    "leases (id INTEGER PRIMARY KEY AUTOINCREMENT, server TEXT NOT NULL UNIQUE, clock TEXT NOT NULL, "
    "until REAL NOT NULL)",
    "claims (job TEXT PRIMARY KEY, lease INTEGER NOT NULL) WITHOUT ROWID",
)
"""Jobs; those that are no more and whose files may still be there; leases, whose numbers only go up; and which lease
holds an unfinished job. What an earlier version did not have is added: that is not disturbed by it."""
_INDEXES = (
    "UNIQUE INDEX IF NOT EXISTS jobs_by_key ON jobs (owner, idempotency_key) WHERE idempotency_key IS NOT NULL",
    "INDEX IF NOT EXISTS jobs_by_end ON jobs (state, completed_at)",
    "INDEX IF NOT EXISTS jobs_by_turn ON jobs (turn)",
)
_NEXT_TURN = "UPDATE jobs SET turn = (SELECT coalesce(max(turn), 0) + 1 FROM jobs) WHERE id = :id"
_FIRST_ENDED = "turn, completed_at, number"
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
_UNCLAIM = "DELETE FROM claims WHERE job = :id"
_REMOVED = "INSERT OR IGNORE INTO removed VALUES (:id)"
_OVER = "clock != :clock OR until <= :now"


def _row(job: Job) -> dict[str, Any]:
    """Return a job's columns."""
    return {name: value(job) for name, (_, value) in _COLUMNS.items()}


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
        self._path = directory / _DATABASE
        self.where = str(self._path)
        self._moment = (clocks or Clocks()).moment
        directories.check_ours("state directory", directory, _is_older)
        self._lock = directories.hold("state directory", directory, _LOCK)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="safelight-jobs")
        try:
            self._connection = self._thread.submit(_connect, self._path).result()
            self._opened = self._path.stat()
            directories.mark(directory)
        except BaseException as error:
            self._let_go()
            if isinstance(error, OSError):
                raise directories.unusable("state directory", directory, error.strerror) from error
            raise

    def _let_go(self) -> None:
        self._thread.shutdown()
        os.close(self._lock)

    async def add(self, job: Job) -> Job:
        return await self._change(self._add, job)

    def _add(self, job: Job) -> Job:
        existing = self._find(job.owner, job.idempotency_key) if job.idempotency_key is not None else None
        if existing is not None:
            return check_same(existing, job.digest)
        self._write(_INSERT, _row(job))
        claimed = self._write(_CLAIM, {"id": job.id, "lease": job.lease})
        self._write("DELETE FROM removed WHERE id = :id", {"id": job.id})
        return job if claimed or job.lease is None else msgspec.structs.replace(job, lease=None)

    async def get(self, job_id: str, owner: str | None = None) -> Job | None:
        where = "id = :id AND (:owner IS NULL OR owner = :owner)"
        return _first(await self._call(self._select, where, {"id": job_id, "owner": owner}))

    async def find(self, owner: str, idempotency_key: str) -> Job | None:
        return await self._call(self._find, owner, idempotency_key)

    def _find(self, owner: str, idempotency_key: str) -> Job | None:
        where = "owner = :owner AND idempotency_key = :key"
        return _first(self._select(where, {"owner": owner, "key": idempotency_key}))

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
        return old.may_become(new) and await self._change(self._replace, old, new)

    def _replace(self, old: Job, new: Job) -> bool:
        before = {"old_state": old.state, "old_attempts": old.attempts, "old_lease": old.lease}
        done = self._write(_UPDATE, {**_row(new), **before}) == 1
        if done and new.finished:
            self._write(_NEXT_TURN, {"id": new.id})
            self._write(_UNCLAIM, {"id": new.id})
        return done

    async def delete(self, job_id: str) -> Job | None:
        return await self._change(self._delete, job_id)

    def _delete(self, job_id: str) -> Job | None:
        found = _first(self._select("id = :id", {"id": job_id}))
        if found is not None:
            for statement in ("DELETE FROM jobs WHERE id = :id", _UNCLAIM, _REMOVED):
                self._write(statement, {"id": job_id})
        return found

    async def unclaimed(self) -> dict[str, Unclaimed]:
        where = f"{_UNFINISHED} AND lease IS NULL ORDER BY number"
        rows = await self._call(self._rows, f"SELECT id, attempts, owner FROM {_JOBS} WHERE {where}")
        return {job_id: Unclaimed(attempts, owner) for job_id, attempts, owner in rows}

    async def begin_lease(self, server: str, seconds: float) -> int:
        return await self._change(self._begin_lease, server, seconds)

    def _begin_lease(self, server: str, seconds: float) -> int:
        values = {"server": server, **self._times(seconds)}
        self._give_up(f"server = :server OR {_OVER}", values)
        inserted = "INSERT INTO leases (server, clock, until) VALUES (:server, :clock, :until) RETURNING id"
        ((lease,),) = self._rows(inserted, values)
        return int(lease)

    async def renew_lease(self, lease: int, seconds: float) -> frozenset[str] | None:
        return await self._change(self._renew_lease, lease, seconds)

    def _renew_lease(self, lease: int, seconds: float) -> frozenset[str] | None:
        values = {"id": lease, **self._times(seconds)}
        renewed = self._write("UPDATE leases SET clock = :clock, until = :until WHERE id = :id", values)
        self._give_up(_OVER, values)
        held = self._rows("SELECT job FROM claims WHERE lease = :id", values)
        return frozenset(job_id for (job_id,) in held) if renewed else None

    def _times(self, seconds: float) -> dict[str, Any]:
        """Return now, and the end of what lasts for so long from now on."""
        now = self._moment()
        return {"clock": now.clock, "now": now.seconds, "until": now.seconds + seconds}

    def _give_up(self, which: str, values: Mapping[str, Any]) -> None:
        """End leases, and let their jobs be claimed anew."""
        self._write(f"DELETE FROM claims WHERE lease IN (SELECT id FROM leases WHERE {which})", values)
        self._write(f"DELETE FROM leases WHERE {which}", values)

    async def claim(self, job_id: str, lease: int) -> Job | None:
        claimed = await self._change(self._write, _CLAIM, {"id": job_id, "lease": lease})
        return await self.get(job_id) if claimed else None

    async def check_writable(self) -> None:
        await self._change(self._write, f"PRAGMA user_version = {_VERSION}", {})  # which is written every time

    async def last_end(self) -> float | None:
        ((found,),) = await self._call(self._rows, "SELECT max(completed_at) FROM jobs")
        return None if found is None else float(found)

    async def expired(self, horizon: Horizon) -> list[Job]:
        by_stamp = "coalesce(expires_at <= :at OR (:knows_all AND completed_at > :at), FALSE)"
        is_expired = f"CASE WHEN expires_clock = :clock THEN expires_moment <= :seconds ELSE {by_stamp} END"
        where = f"{_FINISHED} AND {is_expired} ORDER BY {_FIRST_ENDED} LIMIT :limit"
        moment, others = horizon.moment, {"at": horizon.at, "knows_all": horizon.knows_all, "limit": MAX_PAGE}
        return await self._call(self._select, where, {"clock": moment.clock, "seconds": moment.seconds, **others})

    async def removable(self, failed_first: bool = False) -> list[Job]:
        order = "state = 'completed', " if failed_first else ""
        where = f"{_FINISHED} ORDER BY {order}{_FIRST_ENDED} LIMIT :limit"
        return await self._call(self._select, where, {"limit": MAX_PAGE})

    async def usage(self) -> Usage:
        totals = f"total(num_bytes), total(num_bytes) FILTER (WHERE {_FINISHED}), total(length(record))"
        (row,) = await self._call(self._rows, f"SELECT {totals} FROM jobs")
        return Usage(*map(int, row))

    async def kept(self, job_ids: Collection[str]) -> dict[str, Kept]:
        return await self._call(self._kept, json.dumps(list(job_ids)))

    def _kept(self, job_ids: str) -> dict[str, Kept]:
        """Read one record after the other, and keep of each its files alone: there may be many, and large ones."""
        among = "id IN (SELECT value FROM json_each(?))"
        removed = self._rows(f"SELECT id FROM removed WHERE {among}", (job_ids,))
        found = {job_id: Kept(is_over=True) for (job_id,) in removed}
        query = f"SELECT id, {_FINISHED}, record FROM jobs WHERE {among}"
        for job_id, is_over, record in self._connection.execute(query, (job_ids,)):
            found[job_id] = Kept(bool(is_over), frozenset(file.name for file in read_job(record).files))
        return found

    async def announce(self, job_id: str) -> None:
        await self._change(self._write, _REMOVED, {"id": job_id})

    async def forget(self, job_ids: Collection[str] | None = None) -> None:
        forgotten = "DELETE FROM removed WHERE :ids IS NULL OR id IN (SELECT value FROM json_each(:ids))"
        await self._change(self._write, forgotten, {"ids": None if job_ids is None else json.dumps(list(job_ids))})

    async def close(self) -> None:
        await self._call(self._connection.close)
        self._let_go()

    async def _call(self, function: Callable[..., T], *args: Any) -> T:
        """Do something in the connection's thread."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._named, function, *args)

    async def _change(self, function: Callable[..., T], *args: Any) -> T:
        """Likewise, as one transaction."""
        return await self._call(self._whole, function, *args)

    def _named(self, function: Callable[..., T], *args: Any) -> T:
        with named_failures(self._path.parent):
            return function(*args)

    def _whole(self, function: Callable[..., T], *args: Any) -> T:
        """Do it in one transaction, unless the file has lost its name, and what is written into it is lost."""
        is_there = False
        with suppress(OSError):
            is_there = os.path.samestat(self._opened, self._path.stat())
        if not is_there:
            raise StorageFailedError("the jobs' database is gone from the state directory; start the server again")
        with _transaction(self._connection):
            return function(*args)

    def _write(self, statement: str, values: Mapping[str, Any]) -> int:
        """Return how many rows that has changed."""
        return self._connection.execute(statement, values).rowcount

    def _rows(self, query: str, values: Mapping[str, Any] | tuple[str, ...] = ()) -> list[Any]:
        return self._connection.execute(query, values).fetchall()

    def _select(self, where: str, values: Mapping[str, Any]) -> list[Job]:
        rows = self._connection.execute(f"SELECT record, lease FROM {_JOBS} WHERE {where}", values)
        return [msgspec.structs.replace(read_job(record), lease=lease) for record, lease in rows]


def _first(jobs: list[Job]) -> Job | None:
    return jobs[0] if jobs else None


@contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """Commit what is done inside, or nothing of it."""
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
        raise directories.unusable("state directory", path.parent, f"{path.name}: {error}") from error
    return connection


def _prepare(connection: sqlite3.Connection, path: Path) -> None:
    """Bring the file to this version's form. The version is written every time: a full disk shows at the start."""
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version > _VERSION:
        message = f"{path.name} is of version {version}, and this Safelight knows {_VERSION}; use a newer one"
        raise StateDirectoryError(f"state directory {str(path.parent)!r}: {message}")
    (num_tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    if version == 0 and num_tables:
        problem = f"{path.name} is another program's database; name another folder"
        raise directories.unusable("state directory", path.parent, problem)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA wal_autocheckpoint = 64")  # pages of 4 KiB: the log stays small beside small disks
    with _transaction(connection):
        for table in _TABLES:
            connection.execute(f"CREATE TABLE IF NOT EXISTS {table}")
        there = {name for _, name, *_ in connection.execute("PRAGMA table_info(jobs)")}
        for name, kind in _TYPES.items():
            if name not in there:
                connection.execute(f"ALTER TABLE jobs ADD COLUMN {name} {kind}")
        for index in _INDEXES:
            connection.execute(f"CREATE {index}")
        connection.execute(f"PRAGMA user_version = {_VERSION}")
