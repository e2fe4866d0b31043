"""Where jobs are kept, and who may run which of them. Imports no torch.

**Leases.** A server has one lease in a store, and renews it; by it the server claims jobs. A job is claimed by one
lease at a time: a claim is one atomic statement. A lease that was not renewed in time is given up by whichever server
next renews its own, and its jobs may be claimed anew, as they are after a restart: what had begun has had that attempt.
A lease's number is never used again, and is part of its jobs' form, so that `replace` refuses what a server writes that
has lost it: it is the fencing token. Times are the store's own, where it has a clock: no two machines' are compared.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal, Protocol

import msgspec

from safelight.serving.clocks import Moment
from safelight.serving.jobs.job import Job, Kind

Order = Literal["asc", "desc"]

MAX_PAGE = 100


class Horizon(msgspec.Struct, frozen=True):
    """By what jobs are judged to have expired.

    Attributes:
        moment: now, for what ended by this clock.
        at: by which others must have expired, in seconds since 1970; None expires none of them.
        knows_all: whether others that say to have ended later than `at` have expired too: their clock was wrong.

    """

    moment: Moment
    at: float | None = None
    knows_all: bool = False


class Kept(msgspec.Struct, frozen=True):
    """What the store says of a job's files: whether the job is over, and which it has."""

    is_over: bool
    names: frozenset[str] = frozenset()


class Page(msgspec.Struct, frozen=True):
    """Some jobs of a list, and whether more follow."""

    jobs: list[Job]
    has_more: bool


class Usage(msgspec.Struct, frozen=True):
    """Bytes of all jobs' files and records, of the finished ones among them, which may be removed, and of records."""

    num_bytes: int
    num_bytes_finished: int
    num_bytes_records: int = 0


class Unclaimed(msgspec.Struct, frozen=True):
    """An unfinished job that no lease holds: how often it has begun, and whose it is."""

    attempts: int
    owner: str = ""


class JobStore(Protocol):
    """Where jobs are kept. Every change is durable when its method returns.

    Methods that write raise `StorageFullError` where there is no room, and all raise `StorageBusyError` where another
    program holds the store; nothing has changed then. All raise `StorageFailedError` where the disk fails: a change may
    be there after a restart all the same, and is to be made again.

    Attributes:
        where: the file or place that it is kept in, for whoever starts the server; clients are not told.
        is_exclusive: whether it lets in one server at a time: no other gives up the lease of one that cannot reach it.

    """

    where: str
    is_exclusive: bool

    async def add(self, job: Job) -> Job:
        """Keep a new job, and return it; or the one that its owner sent before with the same idempotency key.

        It is claimed by its lease, unless that has been given up: the job that is returned has none then.

        Raises:
            ConflictError: if the key came with another request.

        """

    async def get(self, job_id: str, owner: str | None = None) -> Job | None:
        """Return a job; None if there is none, or if an owner is given and it is another's."""

    async def find(self, owner: str, idempotency_key: str) -> Job | None:
        """Return the job of an idempotency key."""

    async def page(
        self,
        kind: Kind | None = None,
        owner: str | None = None,
        after: str | None = None,
        limit: int = 20,
        order: Order = "desc",
    ) -> Page:
        """Return at most `limit` jobs (1 to 100) in the order of their acceptance, from the one next to `after`.

        Raises:
            InvalidParameterError: for a limit, an order or an id that it does not take.

        """

    async def replace(self, old: Job, new: Job) -> bool:
        """Put a job's next form in the place of the one that was read, and say whether that was done.

        It is refused if the job has changed meanwhile, another lease or none holds it now, it has been deleted, or may
        not become `new`.
        """

    async def delete(self, job_id: str) -> Job | None:
        """Remove a job, and return its last form; None if there is none. Its files are the caller's to remove."""

    async def check_writable(self) -> None:
        """Do nothing where a job could be changed; raise why it cannot be where it could not."""

    async def unclaimed(self) -> dict[str, Unclaimed]:
        """Return the unfinished jobs that no lease holds, by their ids, in the order of acceptance."""

    async def begin_lease(self, server: str, seconds: float) -> int:
        """Give a server a lease for so long, and return its number; its last one is given up, and what is over."""

    async def renew_lease(self, lease: int, seconds: float) -> frozenset[str] | None:
        """Let a lease last for so long from now on, and give up every one that is over: this one too, after 0 seconds.

        Returns:
            the ids of the jobs that it holds; None if it has been given up before.

        """

    async def claim(self, job_id: str, lease: int) -> Job | None:
        """Let a lease hold a job, and return it; None if it has finished, another holds it, or the lease has ended."""

    async def last_end(self) -> float | None:
        """Return when the last job that there is completed or failed; None where none has."""

    async def expired(self, horizon: Horizon) -> list[Job]:
        """Return what completed or failed and has expired, first finished first: the first `MAX_PAGE` of it."""

    async def removable(self, failed_first: bool = False) -> list[Job]:
        """Return the first `MAX_PAGE` that completed or failed; if asked, those first that have nothing to show."""

    async def usage(self) -> Usage:
        """Return the bytes of all jobs' files and records."""

    async def kept(self, job_ids: Collection[str]) -> dict[str, Kept]:
        """Return what is known of the files of these jobs, or of what was removed and is not forgotten."""

    async def announce(self, job_id: str) -> None:
        """Note that files are written for a job that is not there yet: until it is added, it counts as removed."""

    async def forget(self, job_ids: Collection[str] | None = None) -> None:
        """Forget jobs that were removed, as their files are: these, or all that there are."""

    async def close(self) -> None:
        """Let the store go; nothing else may be called afterwards."""
