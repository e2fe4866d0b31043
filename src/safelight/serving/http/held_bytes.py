"""How many bytes all requests under way hold together, and what each of them does. Imports no torch."""

from __future__ import annotations

from pathlib import Path

from starlette.requests import Request

from safelight.errors import QueueFullError
from safelight.serving.limits import Limits

AT_ONCE = 1 << 19
"""Bytes of one body that are written together, where there is memory for them."""
_KEPT_PART = 8


class HeldBytes:
    """Bytes that all requests under way hold together.

    Args:
        limits: the bounds.
        directory: where the files of large bodies are. They have no names.

    Attributes:
        num_bytes: on disk, and of small bodies in memory.
        in_memory: of these, what has not been written.

    """

    def __init__(self, limits: Limits, directory: Path) -> None:
        self.limits, self.directory = limits, directory
        self.num_bytes = self.in_memory = 0

    def share(self, request: Request) -> Share:
        """Return a request's share, which is given back when it has been answered."""
        share = Share(self)
        request.scope["state"]["at_end"].callback(share.give_back)
        return share


class Share:
    """What one request holds of a `HeldBytes`."""

    def __init__(self, held: HeldBytes) -> None:
        self._of_all = held
        self._num_bytes = self._in_memory = 0

    def take(self, num_bytes: int, is_small: bool) -> None:
        """Count bytes. The last eighth is for what is small.

        Raises:
            QueueFullError: if others hold so many that these are too many.

        """
        most = self._of_all.limits.held_bytes
        if self._of_all.num_bytes + num_bytes > (most if is_small else most - most // _KEPT_PART):
            raise QueueFullError("too much is being received and decoded at once; try again later")
        self._of_all.num_bytes += num_bytes
        self._num_bytes += num_bytes

    def keep(self, num_bytes: int) -> bool:
        """Count bytes in memory, if there is room for them, and no more than are written at once; say whether."""
        in_all = self._of_all.in_memory + num_bytes
        if self._in_memory + num_bytes > AT_ONCE or in_all > self._of_all.limits.memory_bytes:
            return False
        self._of_all.in_memory = in_all
        self._in_memory += num_bytes
        return True

    def written(self) -> None:
        """Count nothing in memory any more."""
        self._of_all.in_memory -= self._in_memory
        self._in_memory = 0

    def give_back(self) -> None:
        """Count nothing any more."""
        self.written()
        self._of_all.num_bytes -= self._num_bytes
        self._num_bytes = 0
