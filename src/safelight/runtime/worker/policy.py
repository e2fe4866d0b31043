"""Which task is resumed next: priority, then deadline, then least remaining work; but first what is owed.

A share of the device's time is owed to the longest task, which short work would overtake for ever, to the oldest, which
priority and deadlines would, and to each tenant that has a share, whatever the others send.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from safelight.core.calls import ModelCall
from safelight.core.executor import Execution
from safelight.core.form import Form
from safelight.core.tenant import NOBODY, Tenant
from safelight.runtime.worker.durations import Durations

EQUAL_WORK = 1.25
"""Remaining work within this factor counts as equal."""
EQUAL_TIME = 2.0
"""The same for the time that is left until deadlines: those of one patience that came one after another are equal."""


@dataclass(eq=False)
class Task:
    """One output of a request in the engine. Times are of the engine's clock, in seconds.

    Attributes:
        execution: the request under way.
        step_cost: latent tokens x branches of a step.
        num_steps: denoising steps; 0 while that is not known.
        arrival: when it was added.
        number: of tasks added before it, the same on every rank.
        priority: higher goes first.
        deadline: when it is too late to begin it.
        tenant: whose it is.
        form: in which form its model calls are made; None until it begins.
        on_device: whether its tensors are on the device.
        step_seconds: what its last unit took, if that was a denoising step.
        tail_seconds: what it has needed since its last step: to decode, for example.
        done: whether it has ended, by itself or with `error`.
        error: what ended it.

    """

    execution: Execution
    step_cost: int
    num_steps: int
    arrival: float
    number: int = 0
    priority: int = 0
    deadline: float = math.inf
    tenant: Tenant = NOBODY
    form: Form | None = None
    on_device: bool = False
    step_seconds: float | None = None
    tail_seconds: float = 0.0
    done: bool = False
    error: Exception | None = None

    @property
    def request_id(self) -> str:
        """Whose output it is."""
        return self.execution.req.request_id

    @property
    def calls(self) -> list[ModelCall]:
        """The model calls that its next unit makes; empty at a boundary."""
        return self.execution.req.pending

    @property
    def is_movable(self) -> bool:
        """Whether all that it holds is in the request: in a thread is nothing before its first call."""
        return self.execution.pipeline.movable or not self.calls

    @property
    def is_resident(self) -> bool:
        """Whether what its next unit runs is on the device."""
        residency = self.execution.pipeline.residency
        return all(residency.is_resident(call.component) for call in self.calls)

    @property
    def has_form(self) -> bool:
        """Whether its form is there: one that began compiled, in another worker, waits until it is."""
        return self.form is None or self.execution.runner.has(self.form)

    def is_lost(self, now: float) -> bool:
        """Say whether it cannot begin any more: it is too late, or its form cannot be had again."""
        return not self.execution.started and (now > self.deadline or not self.can_have_form)

    @property
    def can_have_form(self) -> bool:
        """Whether its form is there, or may come."""
        return self.form is None or self.execution.runner.may_have(self.form)

    @property
    def steps_left(self) -> int:
        """Denoising steps that are still to be done."""
        req = self.execution.req
        return max(0, (req.num_inference_steps or self.num_steps) - req.step_index)

    @property
    def kind(self) -> tuple[str, int]:
        """What its next unit has in common with others that take as long."""
        return (self.execution.req.stage, self.step_cost)


class Account:
    """The device time of those to whom a share of it is owed, over a window that slides.

    Args:
        window: seconds.
        share: of the time since they have been there, and of the window at most.

    Attributes:
        since: when the time of their share began: when their task came, or the first of their tasks.

    """

    def __init__(self, window: float, share: float, since: float = 0.0) -> None:
        self.since = since
        self._window, self._share = window, share
        self._uses: deque[tuple[float, float]] = deque()
        self._used = 0.0

    def lack(self, now: float, unit: float) -> float:
        """Return by how many seconds they would be below their share after a unit of so many; negative is above."""
        while self._uses and self._uses[0][0] <= now - self._window:
            self._used -= self._uses.popleft()[1]
        if not self._uses:
            self._used = 0.0  # without what rounding has left
        return self._share * min(self._window, now - self.since) - self._used - unit

    def record(self, now: float, seconds: float) -> None:
        """Remember a unit that has just ended."""
        self._uses.append((now, seconds))
        self._used += seconds


class Policy:
    """Orders tasks. Shares bound how long priority, deadlines and short work can keep a task waiting.

    Two are had by roles, whichever tasks play them: the longest, and the oldest. The others are had by tenants, each
    for as long as it has tasks: what it did not use while it had none is not owed to it later.

    Args:
        share: of the device's time over the window, idle time included, that each role gets at least.
        window: seconds.

    Attributes:
        step_seconds: how long a step takes, by its cost.
        tail_seconds: how long everything after the last step takes, by a step's cost.
        owed: the task to which, or to whose tenant, time is owed, if the last order began with one.

    """

    def __init__(self, share: float = 0.1, window: float = 60.0) -> None:
        self.share, self.window = share, window
        self.step_seconds: Durations[int] = Durations()
        self.tail_seconds: Durations[int] = Durations()
        self.owed: Task | None = None
        self._roles: list[tuple[Account, Task]] = []
        self._longest, self._oldest = Account(window, share), Account(window, share)
        self._tenants: dict[str, Account] = {}
        self._seen = -math.inf

    def order(self, tasks: Sequence[Task], now: float) -> list[Task]:
        """Return the tasks, the one to resume first at the head.

        Args:
            tasks: all that live.
            now: on the engine's clock.

        """
        remaining = {task: self.remaining(task) for task in tasks}
        is_resident = {task: task.is_resident for task in tasks}

        def rank(task: Task) -> tuple[object, ...]:
            seconds = remaining[task]
            equal = (
                -task.priority,
                _magnitude(task.deadline - now, EQUAL_TIME),
                _magnitude(seconds, EQUAL_WORK),
            )
            return (*equal, not is_resident[task], seconds, task.arrival)

        ordered = sorted(tasks, key=rank)
        self._roles = []
        if tasks:
            longest = max(tasks, key=lambda task: (remaining[task], -task.arrival))
            oldest = min(tasks, key=lambda task: task.arrival)
            self._roles = [(self._longest, longest), (self._oldest, oldest)]
        for account, task in self._roles:
            account.since = task.arrival
        self._open_tenants(tasks)
        self.owed = self._find_owed(ordered, now)
        return sorted(ordered, key=lambda task: task is not self.owed)

    def record(self, tasks: Sequence[Task], now: float, seconds: float) -> None:
        """Remember a unit that tasks of the last order have just done, alone or together.

        What has passed since the unit before counts for whoever's task was there: time in which neither it nor any
        other had the device, on a host that is busy for example, is not owed to it again.
        """
        accounts = [(account, 1.0) for account, task in self._roles if task in tasks]
        for name, account in self._tenants.items():
            part = sum(task.tenant.name == name for task in tasks) / len(tasks)
            accounts += [(account, part)] * (part > 0)
        for account, part in accounts:
            account.record(now, part * max(seconds, now - max(self._seen, account.since)))
        self._seen = now

    def _open_tenants(self, tasks: Sequence[Task]) -> None:
        """Have an account for each tenant that has tasks and a share, and for no other."""
        kept, self._tenants = self._tenants, {}
        for task in tasks:
            tenant = task.tenant
            if tenant.share and tenant.name not in self._tenants:
                known = kept.get(tenant.name)
                self._tenants[tenant.name] = known or Account(self.window, tenant.share, task.arrival)

    def _find_owed(self, ordered: Sequence[Task], now: float) -> Task | None:
        """Return the task that goes first because, with one unit more, its share would still not be exceeded."""
        for account, task in self._roles:
            if account.lack(now, self.step_time(task.step_cost)) >= 0:
                return task
        most, owed = 0.0, None
        for name, account in self._tenants.items():
            first = next(task for task in ordered if task.tenant.name == name)
            lack = account.lack(now, self.step_time(first.step_cost))
            if lack >= most:
                most, owed = lack, first
        return owed

    def remaining(self, task: Task) -> float:
        """Return the seconds that a task still needs.

        What comes after the steps takes as long as it did before for others; one that needs longer is expected to need
        as long again, so that a long decoding does not stay at the head for ever.
        """
        step = self.step_time(task.step_cost)
        tail = self.tail_seconds.median(task.step_cost)
        expected = step if tail is None else tail
        tail_left = expected - task.tail_seconds if task.tail_seconds < expected else task.tail_seconds
        return task.steps_left * step + tail_left

    def step_time(self, cost: int) -> float:
        """Return a step's median duration; of a cost that never ran, in proportion to those that did."""
        known = self.step_seconds.median(cost)
        if known is not None:
            return known
        rates = [seconds / other for other, seconds in self.step_seconds.medians().items()]
        return cost * (median(rates) if rates else 1e-6)


def _magnitude(seconds: float, factor: float) -> float:
    """Return a number that is the same for what is within about that factor."""
    if seconds == math.inf or seconds <= 0:
        return math.copysign(math.inf, seconds or -1.0)
    return round(math.log(seconds, factor))
