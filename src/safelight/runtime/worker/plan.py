"""What a tick does: chosen from the tasks, the clock and the policy alone. Rank 0 chooses; all ranks carry it out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from safelight.runtime.worker.policy import Policy, Task


@dataclass(frozen=True)
class Plan:
    """What one tick does. Whoever has the same tasks can carry it out.

    Attributes:
        resumed: tasks that do a unit; several share their model calls.
        evicted: tasks that leave the device before.
        dropped: tasks that are too late to begin, or began in a form that cannot be had again.
        compiles: whether it is a unit of compiling instead.
        admits: whether a task goes before the stacked step, so that it joins.

    """

    resumed: Sequence[Task] = ()
    evicted: Sequence[Task] = ()
    dropped: Sequence[Task] = ()
    compiles: bool = False
    admits: bool = False


def plan_tick(tasks: Sequence[Task], now: float, policy: Policy, *, max_running: int, stacks: bool, last: Plan) -> Plan:
    """Choose what the next tick does.

    Args:
        tasks: all that live.
        now: on the engine's clock.
        policy: which task is next.
        max_running: tasks that hold device memory at most.
        stacks: whether calls of several tasks are made as one.
        last: what the last tick did.

    """
    dropped = [task for task in tasks if task.is_lost(now)]
    order = policy.order([task for task in tasks if task not in dropped and task.has_form], now)
    num_free = max_running - sum(task.on_device for task in order)
    movable = [task for task in reversed(order) if task.on_device and task.is_movable]
    for head in order:
        if head.on_device or num_free > 0:
            if not stacks:
                return Plan([head], (), dropped)
            resumed, admits = with_companions(head, order, num_free, policy, last)
            return Plan(resumed, (), dropped, admits=admits)
        if movable and order.index(movable[0]) > order.index(head):
            return Plan([head], movable[:1], dropped)
    return Plan((), (), dropped)


def with_companions(
    head: Task, order: Sequence[Task], num_free: int, policy: Policy, last: Plan
) -> tuple[list[Task], bool]:
    """Return the tasks that share a forward with the first one, and whether another is admitted in their place.

    A newcomer goes before, so that it can join; before a task that is owed its share, every other time.
    """
    waiting = [task for task in order if not task.on_device]
    running = [task for task in order if task.on_device] + waiting[:num_free]
    newcomers = [task for task in running if not task.execution.req.in_loop]
    if newcomers and not (last.admits and policy.owed is head):
        return newcomers[:1], True
    keys = {call.stack_key for call in head.calls}
    alike = [task for task in running if task.form == head.form]
    return [task for task in alike if task is head or keys == {call.stack_key for call in task.calls}], False
