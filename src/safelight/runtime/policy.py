"""Which task is resumed next: priority, then deadline, then least remaining work, and a share for the oldest."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

from safelight.core.executor import Execution
from safelight.core.request import ModelCall
from safelight.runtime.durations import Durations

EQUAL_WORK = 1.25
"""Remaining work within this factor counts as equal."""


@dataclass(eq=False)
class Task:
    """One output of a request in the engine. Times are of the engine's clock, in seconds.

    Attributes:
        execution: the request under way.
        step_cost: latent tokens x branches of a step.
        num_steps: denoising steps; 0 while that is not known.
        arrival: when it was added.
        priority: higher goes first.
        deadline: when it is too late to begin it.
        on_device: whether its tensors are on the device.
        uses: (end, duration) of each unit, of the last window.
        step_seconds: what its last unit took, if that was a denoising step.
        done: whether it has ended, by itself or with `error`.
        error: what ended it.

    """

    execution: Execution
    step_cost: int
    num_steps: int
    arrival: float
    priority: int = 0
    deadline: float = math.inf
    on_device: bool = False
    uses: deque[tuple[float, float]] = field(default_factory=deque)
    step_seconds: float | None = None
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
    def steps_left(self) -> int:
        """Denoising steps that are still to be done."""
        req = self.execution.req
        return max(0, (req.num_inference_steps or self.num_steps) - req.step_index)

    @property
    def kind(self) -> tuple[str, int]:
        """What its next unit has in common with others that take as long."""
        return (self.execution.req.stage, self.step_cost)


@dataclass
class Policy:
    """Orders tasks. The share bounds how long priority, deadlines and short work can keep a long task waiting.

    Attributes:
        share: of the device's time over the window, idle time included, that the oldest task gets at least.
        window: seconds.
        step_seconds: how long a step takes, by its cost.

    """

    share: float = 0.1
    window: float = 60.0
    step_seconds: Durations[int] = field(default_factory=Durations)

    def order(self, tasks: Sequence[Task], is_resident: Mapping[Task, bool], now: float) -> list[Task]:
        """Return the tasks, the one to resume first at the head.

        Args:
            tasks: all that live.
            is_resident: whether what a task's next unit needs is on the device.
            now: on the engine's clock.

        """
        owed = self.owed(tasks, now)

        def rank(task: Task) -> tuple[object, ...]:
            seconds = self.remaining(task)
            amount = round(math.log(seconds, EQUAL_WORK)) if seconds > 0 else -math.inf
            equal = (task is not owed, -task.priority, task.deadline, amount)
            return (*equal, not is_resident[task], seconds, task.arrival)

        return sorted(tasks, key=rank)

    def owed(self, tasks: Sequence[Task], now: float) -> Task | None:
        """Return the oldest task if, with one unit more, it would still have had less than its share."""
        if not tasks:
            return None
        oldest = min(tasks, key=lambda task: task.arrival)
        used = self.used(oldest, now)
        unit = self.step_time(oldest.step_cost)
        return oldest if used + unit <= self.share * min(self.window, now - oldest.arrival) else None

    def used(self, task: Task, now: float) -> float:
        """Return the seconds of device time that a task had in the window that ends now."""
        while task.uses and task.uses[0][0] <= now - self.window:
            task.uses.popleft()
        return sum(seconds for _, seconds in task.uses)

    def remaining(self, task: Task) -> float:
        """Return the seconds of denoising that a task still needs."""
        return task.steps_left * self.step_time(task.step_cost)

    def step_time(self, cost: int) -> float:
        """Return a step's median duration; of a cost that never ran, in proportion to those that did."""
        known = self.step_seconds.median(cost)
        if known is not None:
            return known
        rates = [seconds / other for other, seconds in self.step_seconds.medians().items()]
        return cost * (median(rates) if rates else 1e-6)
