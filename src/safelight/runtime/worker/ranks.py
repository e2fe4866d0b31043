"""The ranks that work on the same requests: rank 0 plans each tick, the others carry out the same."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import msgspec
import torch

from safelight.core.params import SamplingParams
from safelight.core.schema import ModelSchema
from safelight.errors import OutOfMemoryError, RankFailedError, SafelightError
from safelight.parallel.collectives import Communicator
from safelight.runtime.messages import Cancel, Submit
from safelight.runtime.worker.forward_estimator import ForwardEstimator
from safelight.runtime.worker.plan import Plan
from safelight.runtime.worker.policy import Task
from safelight.runtime.worker.stage_estimator import StageEstimator

RequestMessage = tuple[Submit | Cancel, list[bytes]]
"""What the API process says of a request, with the arrays' bytes."""

FINE, FAILED, OUT_OF_MEMORY = 0, 1, 2
"""A rank's vote on a task."""


class Order(msgspec.Struct, frozen=True):
    """What one tick does, as rank 0 tells the others.

    Attributes:
        messages: what came from the API process since the last tick.
        resumed, evicted, dropped: numbers of tasks, as in `Plan`.
        stops: whether this is the last.

    """

    messages: Sequence[RequestMessage] = ()
    resumed: list[int] = []
    evicted: list[int] = []
    dropped: list[int] = []
    stops: bool = False

    def plan(self, tasks: Sequence[Task]) -> Plan:
        """Return what is done to the tasks of this rank."""
        by_number = {task.number: task for task in tasks}
        resumed, evicted, dropped = (
            [by_number[number] for number in numbers] for numbers in (self.resumed, self.evicted, self.dropped)
        )
        return Plan(resumed, evicted, dropped)


_ORDER = msgspec.msgpack.Decoder(Order)


class Ranks:
    """All ranks of an engine, as this one sees them. Alone, it sends nothing, and all is agreed.

    Args:
        control: all ranks, over the host, in a process group of its own; None for one rank.
        forward_estimator: of several, whether a forward fits into this rank's memory; None says that each does.
        stage_estimator: of one, whether any unit fits; None says that each does.

    """

    def __init__(
        self,
        control: Communicator | None = None,
        forward_estimator: ForwardEstimator | None = None,
        stage_estimator: StageEstimator | None = None,
    ) -> None:
        self._control = control or Communicator("control")
        self.forward_estimator = forward_estimator
        self._stages = stage_estimator

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self._control.size

    @property
    def schema(self) -> ModelSchema | None:
        """What the model takes, with what is known of its memory; None where nothing is."""
        return None if self._stages is None else self._stages.schema

    @property
    def leads(self) -> bool:
        """Whether this rank plans, and speaks for all."""
        return self._control.rank == 0

    def lead(self, plan: Plan, messages: Sequence[RequestMessage] = ()) -> None:
        """Tell the other ranks what this tick does, and what came before it."""
        if self.size > 1:
            tasks = (plan.resumed, plan.evicted, plan.dropped)
            resumed, evicted, dropped = ([task.number for task in group] for group in tasks)
            self._send(Order(messages, resumed, evicted, dropped))

    def stop(self) -> None:
        """Tell the other ranks that there are no more ticks."""
        if self.size > 1:
            self._send(Order(stops=True))

    def _send(self, order: Order) -> None:
        self._control.broadcast_bytes(msgspec.msgpack.encode(order))

    def follow(self) -> Order | None:
        """Wait for what the next tick does; None if there is none."""
        order = _ORDER.decode(self._control.broadcast_bytes(None))
        return None if order.stops else order

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

    def check_room(self, tasks: Sequence[Task]) -> Exception | None:
        """Say, before a unit that tasks do in common, why it does not fit into every rank's memory; None if it does.

        On several ranks the model calls are looked at, which they share; on one whatever the unit does.
        """
        if self._stages is not None:
            return self._stages.check(tasks)
        calls = [call for task in tasks for call in task.calls if call.signature is not None]
        if self.size == 1 or not calls:
            return None
        fits = self.forward_estimator is None or all(self.forward_estimator.fits(call, len(tasks)) for call in calls)
        return self.agree([None if fits else failure_of(OUT_OF_MEMORY)])[0]

    def refusal(self, params: SamplingParams) -> SafelightError | None:
        """Return why a request can never fit into memory; None where it may, or nobody knows."""
        return None if self._stages is None else self._stages.refusal(params)

    def measured_unit(self, tasks: Sequence[Task]) -> AbstractContextManager[None]:
        """Return a context for a unit of tasks, from which `check_room` learns on one rank."""
        return nullcontext() if self._stages is None else self._stages.measured(tasks)


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
