"""Where connections come in: as many as this process has descriptors for, and some are left for itself. No torch.

A connection's descriptor is the lowest that is free. One that would be above a bound is therefore one connection too
many, whatever else is open; it is told so and closed. What is above the bound stays free for files that bodies and
answers are in, of which a connection has one or two, and above those for workers that start again, media and the store.
"""

from __future__ import annotations

import logging
import resource
import socket
from contextlib import suppress
from typing import Any

from safelight.errors import QueueFullError
from safelight.serving.http.errors import raw_answer

logger = logging.getLogger(__name__)

MAX_CONNECTIONS = 2048
RESERVE = 256
"""Descriptors that are kept for this process itself."""
MOST_DESCRIPTORS = 65536
"""That are asked for where the system sets no bound."""
AT_ONCE = 64
"""Connections that are refused before others have their turn."""
GIVEN_AT_ONCE = 16
"""The same for those that are given out, which cost more."""


def raise_limit() -> int:
    """Let this process open as many files as the system allows it; return how many."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MOST_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MOST_DESCRIPTORS)
    if soft == resource.RLIM_INFINITY or soft >= most:
        return most if soft == resource.RLIM_INFINITY else soft
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    return most


def bound(limit: int) -> int:
    """Return the descriptor from which on connections are refused, where so many can be open."""
    return min(MAX_CONNECTIONS + RESERVE, (limit - min(RESERVE, limit // 2)) // 2)


class Listener(socket.socket):
    """A listening socket that gives out connections below a bound.

    Attributes:
        bound: descriptor from which on a connection is refused.

    """

    bound = MAX_CONNECTIONS + RESERVE
    _given = 0

    def accept(self) -> tuple[socket.socket, Any]:
        """Return the next connection that can be had.

        Raises:
            OSError: as a socket does; `BlockingIOError` too after some were given out or refused, so that others have
                a turn: asyncio takes all that wait, a thousand or two, before it does anything else.

        """
        if self._given == GIVEN_AT_ONCE:
            self._given = 0
            raise BlockingIOError
        for _ in range(AT_ONCE):
            connection, address = super().accept()
            if connection.fileno() < self.bound:
                self._given += 1
                return connection, address
            refuse(connection)
        raise BlockingIOError


def refuse(connection: socket.socket) -> None:
    """Say that there are too many connections, as far as that can be said at once, and close."""
    logger.warning("connections are refused: as many are open as may be")
    error = QueueFullError("as many connections are open as may be; try again later")
    with connection, suppress(OSError):
        connection.setblocking(False)
        connection.send(raw_answer(error))
        connection.shutdown(socket.SHUT_WR)
