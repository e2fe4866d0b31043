"""When finished jobs expire, by clocks that may be wrong. Imports no torch."""

from __future__ import annotations

import msgspec

from safelight.serving.clocks import Clocks
from safelight.serving.jobs.job import Job
from safelight.serving.jobs.store import Horizon

GRACE_SECONDS = 24 * 3600.0
"""For which nothing from before the start is removed, where the clock does not go on from where it was."""
SAME_SECONDS = 60.0
"""By which two clocks may differ that have not been set."""


class Expiry:
    """Says when a job that ends now will expire, and what a server may believe to have expired.

    What ended by the machine's present clock for durations, before this server's start too, expires by that clock. Of
    the rest, which ended before the machine was started, the stamps for people are all that is known: they are believed
    if the clock at the server's start was within a day after the last job's end, and after a day in any case; and then
    by the earlier of that clock and of the time that has passed since the start.

    Args:
        clocks: what it goes by.
        keep_seconds: how long a finished job is kept.

    """

    def __init__(self, clocks: Clocks, keep_seconds: float) -> None:
        self._clocks, self._keep_seconds = clocks, keep_seconds
        self.begin(None)

    def begin(self, last_end: float | None) -> None:
        """Begin to count; `last_end` is when the last job of the store ended, by its stamp."""
        self._start, self._moment = self._clocks.stamp(), self._clocks.moment()
        self._goes_on = last_end is not None and 0 <= self._start - last_end <= GRACE_SECONDS

    def ended(self, job: Job) -> Job:
        """Return a job that has completed or failed as it is if it does so now."""
        now = self._clocks.stamp()
        times = {"completed_at": now, "expires_at": now + self._keep_seconds, "ended": self._clocks.moment()}
        return msgspec.structs.replace(job, **times)

    def now(self) -> float:
        """Return the seconds since 1970 that have passed in any case: the clock may have been set forward."""
        return min(self._clocks.stamp(), self._start + self._passed())

    def horizon(self) -> Horizon:
        """Return by what jobs are judged now."""
        passed = self._passed()
        believes = self._goes_on or passed >= GRACE_SECONDS
        knows_all = passed >= max(GRACE_SECONDS, self._keep_seconds)
        return Horizon(self._clocks.moment(), self.now() if believes else None, knows_all)

    def end(self, job: Job) -> float:
        """Return when a finished job's addresses end, in seconds since 1970: not before the job.

        That is the stamp that people are shown, unless the clock was set meanwhile.
        """
        assert job.expires_at is not None
        if job.expires is None or job.expires.clock != self._moment.clock:
            return job.expires_at
        left = job.expires.seconds - self._clocks.moment().seconds
        steady = self._start + self._passed()  # what the clock would say now if nobody had set it
        if abs(job.expires_at - steady - left) < SAME_SECONDS:
            return job.expires_at
        return max(self._clocks.stamp(), steady) + left

    def _passed(self) -> float:
        return self._clocks.moment().since(self._moment) or 0.0
