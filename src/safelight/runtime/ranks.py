"""The ranks that work on the same requests: rank 0 plans each tick, the others carry out the same."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import msgspec
import torch

from safelight.core.request import CallMaker, ModelCall
from safelight.errors import OutOfMemoryError, RankFailedError, SafelightError
from safelight.parallel.collectives import Communicator
from safelight.runtime.messages import ToWorker
from safelight.runtime.room import Room

FINE, FAILED, OUT_OF_MEMORY = 0, 1, 2
"""A rank's vote on a task."""


class Order(msgspec.Struct, frozen=True):
    """What one tick does, as rank 0 tells the others.

    Attributes:
        messages: what came from the API process since the last tick, encoded, each with its arrays' bytes.
        resumed, evicted, dropped: numbers of tasks, as in `Plan`.
        stops: whether this is the last.

    """

    messages: list[tuple[bytes, list[bytes]]] = []
    resumed: list[int] = []
    evicted: list[int] = []
    dropped: list[int] = []
    stops: bool = False


_ORDER = msgspec.msgpack.Decoder(Order)
_MESSAGE: msgspec.msgpack.Decoder[ToWorker] = msgspec.msgpack.Decoder(ToWorker)


class Ranks:
    """All ranks of an engine, as this one sees them. Alone, it sends nothing, and all is agreed.

    Args:
        control: all ranks, over the host, in a process group of its own; None for one rank.
        room: whether a forward fits into this rank's memory; None does not ask.

    """

    def __init__(self, control: Communicator | None = None, room: Room | None = None) -> None:
        self._control = control or Communicator("control")
        self._room = room

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self._control.size

    @property
    def leads(self) -> bool:
        """Whether this rank plans, and speaks for all."""
        return self._control.rank == 0

    def lead(self, order: Order) -> None:
        """Tell the other ranks what this tick does."""
        if self.size > 1:
            self._control.broadcast_bytes(msgspec.msgpack.encode(order))

    def follow(self) -> Order:
        """Wait for what the next tick does."""
        return _ORDER.decode(self._control.broadcast_bytes(None))

    def agree(self, errors: Sequence[Exception | None]) -> list[Exception | None]:
        """Vote on what a unit did to each of its tasks: what failed on one rank has failed on all.

        Returns:
            this rank's own error; where another failed alone, an error that says so; None where all is well.

        """
        if self.size == 1 or not errors:
            return list(errors)
        votes = self._control.all_gather_list(torch.tensor([vote_of(error) for error in errors], dtype=torch.uint8))
        verdicts = torch.stack(votes).amax(0).tolist()
        return [reason_of(error) or failure_of(verdict) for error, verdict in zip(errors, verdicts, strict=True)]

    def check_room(self, calls: Sequence[ModelCall]) -> Exception | None:
        """Say, before a forward begins, whether it fits into every rank's memory; None if it does."""
        if self.size == 1 or self._room is None:
            return None
        own = None if all(map(self._room.has_room, calls)) else failure_of(OUT_OF_MEMORY)
        return self.agree([own])[0]

    def measured(self, make: CallMaker) -> CallMaker:
        """Return a maker of calls from which `check_room` learns."""
        if self.size == 1 or self._room is None:
            return make
        return functools.partial(self._room.measured, make=make)


def vote_of(error: Exception | None) -> int:
    """Return a rank's vote."""
    if error is None:
        return FINE
    out_of_memory = isinstance(reason_of(error), torch.OutOfMemoryError | MemoryError | OutOfMemoryError)
    return OUT_OF_MEMORY if out_of_memory else FAILED


def reason_of(error: Exception | None) -> Exception | None:
    """Return what made a shared piece of work fail, on the rank that knows it."""
    if isinstance(error, RankFailedError) and isinstance(error.__cause__, Exception):
        return error.__cause__
    return error


def failure_of(verdict: int) -> SafelightError | None:
    """Return the error of a task that failed on another rank."""
    if verdict == OUT_OF_MEMORY:
        return OutOfMemoryError("this request needs more memory than there is on a device; ask for less at once")
    return RankFailedError("the request failed on another of the devices that share it") if verdict else None


def encoded(message: ToWorker) -> bytes:
    """Return a message as it stands in an order."""
    return msgspec.msgpack.encode(message)


def decoded(order: Order) -> list[tuple[ToWorker, list[bytes]]]:
    """Return an order's messages."""
    return [(_MESSAGE.decode(message), arrays) for message, arrays in order.messages]
