"""What waits for something outside of this process: a database that another holds, a clock that may be wrong."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from safelight.errors import StorageBusyError

T = TypeVar("T")
logger = logging.getLogger(__name__)

GRACE_SECONDS = 24 * 3600.0
"""For which nothing from before the start is removed, where the clock does not go on from where it was."""


async def when_free(
    call: Callable[[], Awaitable[T]], seconds: float, retry_seconds: float, stops: Callable[[], bool]
) -> T:
    """Do something with the jobs' store, again and again while another program holds it.

    Args:
        call: does it.
        seconds: after which it is given up.
        retry_seconds: between two attempts.
        stops: whether this server stops, so that it is given up at once.

    Raises:
        StorageBusyError: if it is given up.

    """
    begun = time.monotonic()
    for tried in itertools.count():
        try:
            return await call()
        except StorageBusyError as error:
            if stops() or time.monotonic() - begun >= seconds:
                raise
            if tried == 0:
                logger.error("%s", error)
        await asyncio.sleep(retry_seconds)
    raise AssertionError("it counts for ever")


class Expiry:
    """Says what a server may believe to have expired.

    While it runs, by the earlier of the clock and of the time that has passed since its start. Of what ended before
    that: the same, if the clock at the start was within a day after the last job's end; otherwise nothing for a day.

    Args:
        clock: seconds since 1970.
        monotonic: seconds that nobody sets.

    """

    def __init__(self, clock: Callable[[], float], monotonic: Callable[[], float]) -> None:
        self._clock, self._monotonic = clock, monotonic
        self.begin(None)

    def begin(self, last_end: float | None) -> None:
        """Begin to count; `last_end` is when the last job of the store ended."""
        self._start, self._passed = self._clock(), self._monotonic()
        self._goes_on = last_end is not None and 0 <= self._start - last_end <= GRACE_SECONDS

    def horizon(self) -> tuple[float, float | None]:
        """Return the time by which a job must have expired, and, if that matters, since when it must have ended."""
        passed = self._monotonic() - self._passed
        since = None if self._goes_on or passed >= GRACE_SECONDS else self._start
        return min(self._clock(), self._start + passed), since
