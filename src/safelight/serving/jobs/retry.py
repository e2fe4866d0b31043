"""What waits for a database that another program holds, or a disk that fails. Imports no torch."""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from safelight.errors import StorageBusyError, StorageFailedError

T = TypeVar("T")
logger = logging.getLogger(__name__)


class Retry:
    """Does something with the jobs' store, again and again while another program holds it, or its disk fails.

    Args:
        retry_seconds: between two attempts.

    Attributes:
        stops: whether this server stops, so that everything is given up at its next failure.

    """

    def __init__(self, retry_seconds: float) -> None:
        self._retry_seconds = retry_seconds
        self.stops = False

    async def __call__(self, call: Callable[[], Awaitable[T]], seconds: float = math.inf) -> T:
        """Return what the call does; after `seconds` it is given up.

        Raises:
            StorageBusyError, StorageFailedError: if it is given up.

        """
        begun = time.monotonic()
        for tried in itertools.count():
            try:
                return await call()
            except (StorageBusyError, StorageFailedError) as error:
                if self.stops or time.monotonic() - begun >= seconds:
                    raise
                if tried == 0:
                    logger.error("%s", error)
            await asyncio.sleep(self._retry_seconds)
        raise AssertionError("it counts for ever")
