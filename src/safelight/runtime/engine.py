"""The engine: many requests on one device, each resumed a unit at a time."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Sequence
from typing import Literal

import torch

from safelight.acceleration.callers import Callers
from safelight.core.executor import Execution
from safelight.core.pipeline import ComposedPipeline
from safelight.core.request import Prediction, Req, move
from safelight.core.server_args import Mode
from safelight.errors import CancelledError, CompilationError, DeadlineError, RankFailedError, SafelightError
from safelight.parallel.collectives import DesynchronisedError
from safelight.runtime.batching import run_stacked, stack_key
from safelight.runtime.cost import step_cost
from safelight.runtime.policy import Plan, Policy, Task
from safelight.runtime.ranks import Ranks
from safelight.runtime.watch import Watch

logger = logging.getLogger(__name__)

Batching = Literal["exact", "throughput"]
HOST = torch.device("cpu")
COMPILE_PATIENCE = 60.0
"""Seconds for which the engine waits for a moment without requests before it compiles between two units."""


class Engine:
    """Drives the tasks of one pipeline.

    Args:
        pipeline: the loaded model.
        policy: which task is next.
        max_running: tasks that hold device memory at most.
        batching: `exact` runs each model call alone; `throughput` stacks those of equal signature.
        clock: seconds; only differences count.
        watch: is told of every unit.
        callers: make the model calls; None makes them as the pipeline's settings say.
        ranks: that carry out the same plans; None for one.

    """

    def __init__(
        self,
        pipeline: ComposedPipeline,
        policy: Policy | None = None,
        *,
        max_running: int = 4,
        batching: Batching = "exact",
        clock: Callable[[], float] = time.perf_counter,
        watch: Watch | None = None,
        callers: Callers | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.pipeline = pipeline
        self.policy = policy or Policy()
        self.max_running = max_running
        self.batching = batching
        self.clock = clock
        self.watch = watch or Watch()
        self.callers = callers or Callers(pipeline, stacked=batching == "throughput")
        self.ranks = ranks or Ranks()
        self.tasks: list[Task] = []
        self._num_added = 0
        self._newcomer_was_last = False
        self._compile_due: float | None = None

    def add(self, req: Req, *, priority: int = 0, deadline: float | None = None, mode: Mode | None = None) -> Task:
        """Take a request's output in.

        Args:
            req: the output, whose parameters are resolved.
            priority: higher goes first.
            deadline: seconds from now after which it is not begun any more.
            mode: that it began with in an engine before; None where it has not begun.

        """
        now, params = self.clock(), req.params
        cost = step_cost(params, self.pipeline.schema)
        task = Task(Execution(self.pipeline, req), cost, params.num_steps(), now, self._num_added, priority)
        self._num_added += 1
        if deadline is not None:
            task.deadline = now + deadline
        if self.callers.compilation is not None:
            task.mode = mode
        self.tasks.append(task)
        return task

    def cancel(self, request_id: str) -> list[Task]:
        """End every task of a request, here and now; return them."""
        cancelled = [task for task in self.tasks if task.request_id == request_id]
        for task in cancelled:
            self._end(task, CancelledError("the request was cancelled"))
        return cancelled

    def tick(self) -> Sequence[Task]:
        """Resume some of the tasks by one unit; return those that something happened to."""
        return self.carry_out(self.plan())

    def carry_out(self, plan: Plan) -> Sequence[Task]:
        """Do what a plan says; return the tasks that something happened to."""
        if plan.compiles:
            self._compile()
        for task in plan.dropped:
            self._end(task, self._refusal(task))
        for task in plan.evicted:
            self._evict(task)
        resumed = self._resume(plan.resumed) if plan.resumed else ()
        return [*plan.dropped, *resumed]

    @property
    def busy(self) -> bool:
        """Whether a tick has something to do: not while all that live wait for the compiled form."""
        return any(self._has_form(task) for task in self.tasks) or self._compiles_now()

    def plan(self) -> Plan:
        """Choose what the next tick does."""
        if self._compiles_now():
            return Plan(compiles=True)
        now = self.clock()
        dropped = [task for task in self.tasks if self._is_lost(task, now)]
        order = self.order([task for task in self.tasks if task not in dropped and self._has_form(task)], now)
        num_free = self.max_running - sum(task.on_device for task in order)
        movable = [task for task in reversed(order) if task.on_device and self.pipeline.movable]
        for head in order:
            behind = movable[:1] if movable and order.index(movable[0]) > order.index(head) else []
            if head.on_device or num_free > 0:
                return Plan(self._with_companions(head, order, num_free), (), dropped)
            if behind:
                return Plan([head], behind, dropped)
        return Plan((), (), dropped)

    def order(self, tasks: Sequence[Task], now: float) -> list[Task]:
        """Return tasks in the order in which they are to be resumed."""
        is_resident, needed = self.pipeline.residency.is_resident, self.pipeline.needed_components
        resident = {task: all(map(is_resident, needed(task.execution.req))) for task in tasks}
        return self.policy.order(tasks, resident, now)

    def _with_companions(self, head: Task, order: Sequence[Task], num_free: int) -> list[Task]:
        """Return the tasks that share a forward with the first one.

        A newcomer goes before, so that it can join; before a task that is owed its share, every other time.
        """
        if self.batching == "exact":
            return [head]
        waiting = [task for task in order if not task.on_device]
        running = [task for task in order if task.on_device] + waiting[:num_free]
        newcomers = [task for task in running if not task.calls]
        if newcomers and not (self._newcomer_was_last and self.policy.owed is head):
            self._newcomer_was_last = True
            return newcomers[:1]
        self._newcomer_was_last = False
        keys = {stack_key(call) for call in head.calls}
        alike = [task for task in running if task.mode == head.mode]
        return [task for task in alike if task is head or (keys and keys == {stack_key(c) for c in task.calls})]

    def _is_lost(self, task: Task, now: float) -> bool:
        """Say whether a task cannot begin any more."""
        return not task.execution.started and (now > task.deadline or not self._can_have_form(task))

    def _can_have_form(self, task: Task) -> bool:
        compilation = self.callers.compilation
        return task.mode != "compiled" or (compilation is not None and compilation.state != "failed")

    def _has_form(self, task: Task) -> bool:
        """Say whether a task's mode is there: one that began compiled, in another worker, waits until it is."""
        return task.mode != "compiled" or self.callers.mode == "compiled"

    def _refusal(self, task: Task) -> SafelightError:
        if not self._can_have_form(task):
            return CompilationError("the request began in the model's compiled form, which cannot be made again")
        return DeadlineError("the request's deadline passed before it could begin")

    def _compiles_now(self) -> bool:
        """Say whether it is time for a unit of compiling: between requests, or at last between two units.

        It is when only tasks are left that wait for the compiled form.
        """
        compilation = self.callers.compilation
        if compilation is None or compilation.state != "pending" or not compilation.is_due():
            return False
        now = self.clock()
        self._compile_due = now if self._compile_due is None else self._compile_due
        return now >= self._compile_due + COMPILE_PATIENCE or not any(self._has_form(task) for task in self.tasks)

    def _compile(self) -> None:
        """Do a unit of compiling. Each may take as long as a first unit, and is no request's."""
        compilation = self.callers.compilation
        assert compilation is not None
        kind, begun = ("compilation", compilation.num_done), self.clock()
        self.watch.begin(kind, ())
        compilation.advance()
        self.watch.end(kind, self.clock() - begun)

    def _begin(self, task: Task) -> None:
        """Choose how a request's calls are made, when the first of its outputs begins: alike for all."""
        if task.mode is None:
            for other in self.tasks:
                if other.request_id == task.request_id:
                    other.mode = self.callers.mode
        assert task.mode is not None
        task.execution.make_call = self.ranks.measured(self.callers.of(task.mode))

    def _resume(self, tasks: Sequence[Task]) -> Sequence[Task]:
        """Do a unit of each, the model calls of several in common, or of the first where those do not fit.

        Returns:
            the tasks that did a unit.

        """
        kind, begun = tasks[0].kind, self.clock()
        self.watch.begin(kind, [task.request_id for task in tasks])
        for task in tasks:
            if not task.execution.started:
                self._begin(task)
            self._place(task)
        no_room = self.ranks.check_room(tasks)
        if no_room is not None and len(tasks) > 1:
            tasks = tasks[:1]
            self.watch.begin(kind, [tasks[0].request_id])
            no_room = self.ranks.check_room(tasks)
        steps_left = [task.steps_left for task in tasks]
        if no_room is None:
            ended = [self._advance(task, results) for task, results in zip(tasks, self._results(tasks), strict=True)]
            errors = self.ranks.agree([error for _, error in ended])
        else:
            ended, errors = [(False, None)] * len(tasks), [no_room] * len(tasks)
        for task, (is_over, _), error in zip(tasks, ended, errors, strict=True):
            if is_over or error is not None:
                self._end(task, error)
        now = self.clock()
        seconds = now - begun  # each had the device for all of it, alone or with others
        self.policy.record(tasks, now, seconds)
        for task, before in zip(tasks, steps_left, strict=True):
            self._learn(task, before, seconds)
        self.watch.end(kind, seconds)
        return tasks

    def _learn(self, task: Task, steps_left: int, seconds: float) -> None:
        """Remember what a unit took, of a task that had so many steps left before."""
        task.step_seconds = seconds if task.steps_left < steps_left and task.error is None else None
        if task.step_seconds is not None:
            self.policy.step_seconds.record(task.step_cost, seconds)
        elif not steps_left:
            task.tail_seconds += seconds
        if task.done and task.error is None:
            self.policy.tail_seconds.record(task.step_cost, task.tail_seconds)

    def _results(self, tasks: Sequence[Task]) -> Sequence[list[Prediction] | None]:
        """Make the calls of the tasks in common; None leaves them to each task."""
        if self.batching == "throughput" and tasks[0].calls:
            try:
                run_calls = self.pipeline.run_calls if self.pipeline.shares_branches else None
                return list(run_stacked(tasks[0].execution.make_call, [task.calls for task in tasks], run_calls))
            except Exception as error:  # a request's boundary: apart, only the one at fault fails
                if self.ranks.size > 1:
                    raise DesynchronisedError("a forward that several ranks share failed on one") from error
                logger.warning("a stacked forward failed; its %d calls are made apart", len(tasks), exc_info=True)
                free_memory()
        return [None] * len(tasks)

    def _advance(self, task: Task, results: list[Prediction] | None) -> tuple[bool, Exception | None]:
        """Do a task's unit; return whether the task is over, and what it raised."""
        shared = self.ranks.size > 1 and task.execution.req.stage in self.pipeline.shared_stages
        try:
            return not task.execution.advance(results), None
        except DesynchronisedError:
            raise
        except Exception as error:  # a request's boundary: nothing else holds its state
            if shared and not isinstance(error, RankFailedError):
                raise DesynchronisedError("a stage that several ranks share failed on one") from error
            return True, error

    def _evict(self, task: Task) -> None:
        with torch.inference_mode():
            move(task.execution.req, HOST)
        task.on_device = False

    def _place(self, task: Task) -> None:
        if not task.on_device and task.execution.started:
            with torch.inference_mode():
                move(task.execution.req, self.pipeline.device)
        task.on_device = True

    def _end(self, task: Task, error: Exception | None = None) -> None:
        task.execution.close()
        task.done, task.error, task.on_device = True, error, False
        self.tasks.remove(task)
        if is_out_of_memory(error):
            free_memory()


def is_out_of_memory(error: Exception | None) -> bool:
    """Say whether an error is of memory, on the device or the host."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def free_memory() -> None:
    """Give back what a failed unit left behind."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
