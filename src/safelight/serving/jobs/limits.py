"""What bounds jobs. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from safelight.core.tenant import Tenant


@dataclass(frozen=True)
class JobLimits:
    """What bounds jobs.

    Attributes:
        max_unfinished: jobs that wait or run; more are refused.
        max_submitted: of these, how many the engine is given; the others leave its queue to who waits for an answer. A
            tenant that comes later is given its share of them beside.
        max_taken: jobs from the store, as after a restart, that are in memory at a time; the others wait in the store.
        max_submitted_bytes: of the input files of these, unless it is one job alone; the others' stay on the disk.
        keep_seconds: how long a finished job and its files are kept.
        max_bytes: of all jobs' files and records; the first finished are removed for later ones. None is no limit.
        max_record_bytes: of all jobs' records; beyond, failed jobs are removed, and then completed ones.
        sweep_seconds: between two searches for what has expired.
        retry_seconds: after which a full or unready engine, a full disk, or a held database is tried again,
            and a job that runs elsewhere is looked at.
        busy_seconds: for which whoever waits for an answer waits for a held database.
        lease_seconds: for which a server that says nothing keeps its jobs from the others of its store.
        tenants: by owner, as whom jobs have a share of the device's time and of `max_submitted`.

    """

    max_unfinished: int = 1000
    max_submitted: int = 16
    max_taken: int = 64
    max_submitted_bytes: int = 64 << 20
    keep_seconds: float = 24 * 3600.0
    max_bytes: int | None = None
    max_record_bytes: int = 64 << 20
    sweep_seconds: float = 60.0
    retry_seconds: float = 0.25
    busy_seconds: float = 5.0
    lease_seconds: float = 30.0
    tenants: Mapping[str, Tenant] = field(default_factory=dict)
