"""The engine: many requests on one device, each resumed a unit at a time."""

from __future__ import annotations

import gc
import logging
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch

from safelight.core.device import Span, begin_span, is_lost, is_out_of_memory
from safelight.core.executor import Execution
from safelight.core.form import Form
from safelight.core.pipeline import ComposedPipeline
from safelight.core.request import Req, move
from safelight.core.tenant import NOBODY, Tenant
from safelight.core.trees import Tree
from safelight.errors import CancelledError, CompilationError, DeadlineError, DeviceLostError, SafelightError
from safelight.parallel.collectives import DesynchronisedError
from safelight.runtime.cost import step_cost
from safelight.runtime.worker.model_runner import PipelineRunner
from safelight.runtime.worker.plan import Plan, plan_tick
from safelight.runtime.worker.policy import Policy, Task
from safelight.runtime.worker.ranks import Ranks
from safelight.runtime.worker.watch import Watch

logger = logging.getLogger(__name__)

Batching = Literal["exact", "throughput"]
HOST = torch.device("cpu")
COMPILE_PATIENCE = 60.0
"""Seconds for which the engine waits for a moment without requests before it compiles between two units."""


@dataclass(frozen=True)
class Part:
    """What a unit was for one of its tasks: a denoising step, something after the last step, its last unit."""

    was_step: bool
    was_tail: bool
    was_last: bool


@dataclass(frozen=True)
class Issued:
    """A unit that the device was given.

    Attributes:
        tasks: whose it is.
        parts: what it was for each of them.
        kind: of it.
        span: of the device's work.

    """

    tasks: Sequence[Task]
    parts: Sequence[Part]
    kind: tuple[str, int]
    span: Span


class Engine:
    """Drives the tasks of a pipeline, or of several on one device.

    A device may do its work after the host has given it. The host is ahead by one unit of the same tasks at most: what
    a unit took is learnt when the device has done it, and before other tasks have their turn it has done everything, so
    that a unit that fails or hangs is always the announced one or the one before, of the same requests.

    Args:
        pipeline: the loaded model.
        policy: which task is next.
        max_running: tasks that hold device memory at most.
        batching: `exact` runs each model call alone; `throughput` stacks those of equal signature.
        clock: seconds; only differences count.
        watch: is told of every unit.
        others: further models by their names, on the same device: requests name theirs (`Req.model`).
        ranks: that carry out the same plans; None for one.
        begin: begins the span of what the device is given next; the device's unless given.

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
        others: Mapping[str, ComposedPipeline] | None = None,
        ranks: Ranks | None = None,
        begin: Callable[[], Span] | None = None,
    ) -> None:
        self.pipeline = pipeline
        self.policy = policy or Policy()
        self.max_running = max_running
        self.batching = batching
        self.clock = clock
        self.watch = watch or Watch()
        self.ranks = ranks or Ranks()
        self.runners = {
            name: PipelineRunner(each, batching == "throughput", self.ranks.forward_estimator)
            for name, each in {"": pipeline, **(others or {})}.items()
        }
        self.runner = self.runners[""]
        self.tasks: list[Task] = []
        self._begin_span = begin or partial(begin_span, pipeline.device, clock)
        self._issued: deque[Issued] = deque()
        self._num_added = 0
        self._plan = Plan()
        self._compile_due: float | None = None

    def add(
        self,
        req: Req,
        *,
        priority: int = 0,
        deadline: float | None = None,
        form: Form | None = None,
        tenant: Tenant = NOBODY,
    ) -> Task:
        """Take a request's output in.

        Args:
            req: the output, whose parameters are resolved.
            priority: higher goes first.
            deadline: seconds from now after which it is not begun any more.
            form: in which it began in an engine before; None where it has not begun.
            tenant: whose it is.

        """
        now, params, runner = self.clock(), req.params, self.runners[req.model]
        cost = step_cost(params, runner.pipeline.schema)
        execution = Execution(runner.pipeline, req, runner, self._begin_span)
        task = Task(execution, cost, params.num_steps(), now, self._num_added, priority, tenant=tenant)
        self._num_added += 1
        if deadline is not None:
            task.deadline = now + deadline
        if runner.compilation is not None:
            task.form = form
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
        """Do what a plan says; return the tasks that something happened to.

        Of tasks that do not fit together, the first alone does its unit.
        """
        if plan.compiles:
            self._compile()
        for task in plan.dropped:
            self._end(task, self._refusal(task))
        self._catch_up(plan.resumed)
        lost = self._move(plan.evicted, HOST)
        if not plan.resumed:
            return [*plan.dropped, *lost]
        kind, span = plan.resumed[0].kind, self._begin_span()
        tasks, without_room = self._admit(plan.resumed)
        steps_left = [task.steps_left for task in tasks]
        if tasks:
            with self.ranks.measured_unit(tasks):
                self._advance(tasks)
            span.end()
            parts = [part_of(task, before) for task, before in zip(tasks, steps_left, strict=True)]
            self._issued.append(Issued(tasks, parts, kind, span))
        self._learn(1 if tasks and all(task.calls for task in tasks) else 0)
        return [*plan.dropped, *lost, *without_room, *tasks]

    @property
    def busy(self) -> bool:
        """Whether a tick has something to do: not while all that live wait for the compiled form."""
        return any(task.has_form for task in self.tasks) or self._compiles_now()

    def plan(self) -> Plan:
        """Choose what the next tick does."""
        if self._compiles_now():
            self._plan = Plan(compiles=True)
        else:
            self._plan = plan_tick(
                self.tasks,
                self.clock(),
                self.policy,
                max_running=self.max_running,
                stacks=self.batching == "throughput",
                last=self._plan,
            )
        return self._plan

    def _refusal(self, task: Task) -> SafelightError:
        if not task.can_have_form:
            return CompilationError("the request began in the model's compiled form, which cannot be made again")
        return DeadlineError("the request's deadline passed before it could begin")

    def _compiles_now(self) -> bool:
        """Say whether it is time for a unit of compiling: between requests, or at last between two units.

        It is when only tasks are left that wait for the compiled form.
        """
        compilation = self.runner.compilation
        if compilation is None or compilation.state != "pending" or not compilation.is_due():
            return False
        now = self.clock()
        self._compile_due = now if self._compile_due is None else self._compile_due
        return now >= self._compile_due + COMPILE_PATIENCE or not any(task.has_form for task in self.tasks)

    def _compile(self) -> None:
        """Do a unit of compiling. Each may take as long as a first unit, and is no request's."""
        compilation = self.runner.compilation
        assert compilation is not None
        kind, begun = ("compilation", compilation.num_done), self.clock()
        self.watch.begin(kind, ())
        compilation.advance()
        self.watch.learn(kind, self.clock() - begun)
        self.watch.rest()

    def _begin(self, task: Task) -> None:
        """Choose how a request's calls are made, when the first of its outputs begins: alike for all."""
        if task.form is None:
            for other in self.tasks:
                if other.request_id == task.request_id:
                    other.form = task.execution.runner.form
        assert task.form is not None
        task.execution.form = task.form

    def _admit(self, tasks: Sequence[Task]) -> tuple[Sequence[Task], Sequence[Task]]:
        """Announce a unit of tasks, and have them on the device; return who has room for it, and who ended for want."""
        self.watch.begin(tasks[0].kind, [task.request_id for task in tasks])
        for task in tasks:
            if not task.execution.started:
                self._begin(task)
        if lost := self._move([task for task in tasks if not task.on_device], self.pipeline.device):
            return (), lost
        no_room = self.ranks.check_room(tasks)
        if no_room is not None and len(tasks) > 1:
            tasks = tasks[:1]
            self.watch.begin(tasks[0].kind, [tasks[0].request_id])
            no_room = self.ranks.check_room(tasks)
        if no_room is None:
            return tasks, ()
        self._end(tasks[0], no_room)
        return (), tasks

    def _advance(self, tasks: Sequence[Task]) -> None:
        """Do the unit of each task, their calls in common; vote on what became of each, and end those that are over."""
        over: list[bool] = []
        errors: list[Exception | None] = []
        for task, results in zip(tasks, self._results(tasks), strict=True):
            try:
                over.append(not task.execution.advance(results))
                errors.append(None)
            except Exception as error:  # a request's boundary: nothing else holds its state
                self._check_fatal(error)
                over.append(True)
                errors.append(error)
        for task, is_over, agreed in zip(tasks, over, self.ranks.agree(errors), strict=True):
            if is_over or agreed is not None:
                self._end(task, agreed)

    def _catch_up(self, tasks: Sequence[Task]) -> None:
        """Wait for what the device was given of other tasks than these."""
        if self._issued and list(self._issued[-1].tasks) != list(tasks):
            self._learn(0)

    def _learn(self, ahead: int) -> None:
        """Wait for the device until it is behind by so many units, and remember what those that it has done took."""
        while self._issued and (len(self._issued) > ahead or self._issued[0].span.is_over()):
            issued = self._issued.popleft()
            seconds = issued.span.wait()  # each task had the device for all of it, alone or with others
            self.policy.record(issued.tasks, issued.span.seen, seconds)
            for task, part in zip(issued.tasks, issued.parts, strict=True):
                self._learn_of(task, part, seconds)
            self.watch.learn(issued.kind, seconds)
        if not self._issued:
            self.watch.rest()

    def _learn_of(self, task: Task, part: Part, seconds: float) -> None:
        """Remember what a unit took of a task."""
        task.step_seconds = seconds if part.was_step else None
        if part.was_step:
            self.policy.step_seconds.record(task.step_cost, seconds)
        elif part.was_tail:
            task.tail_seconds += seconds
        if part.was_last:
            self.policy.tail_seconds.record(task.step_cost, task.tail_seconds)

    def _results(self, tasks: Sequence[Task]) -> Sequence[list[Tree] | None]:
        """Make the calls of several tasks in common; None leaves them to each task."""
        if len(tasks) > 1:
            forwards = [task.execution.forwards() for task in tasks]
            try:
                made = iter(tasks[0].execution.runner.run([each for own in forwards for each in own]))
                return [[next(made) for _ in own] for own in forwards]
            except Exception as error:  # a request's boundary: apart, only the one at fault fails
                self._check_fatal(error)
                logger.warning("a stacked forward failed; its %d calls are made apart", len(tasks), exc_info=True)
                free_memory()
        return [None] * len(tasks)

    def _check_fatal(self, error: Exception) -> None:
        """Let an error end the process that leaves it without its device, or without the other ranks.

        Raises:
            DeviceLostError: for the first.
            DesynchronisedError: for the second.

        """
        if isinstance(error, DesynchronisedError):
            raise error
        if is_lost(self.pipeline.device, error):
            raise DeviceLostError("the device has failed, and takes no more work from this process") from error

    def _move(self, tasks: Sequence[Task], device: torch.device) -> list[Task]:
        """Have tasks on the device, or on the host; end and return those for which there is no room."""
        moved = [task for task in tasks if task.execution.started]
        errors = self.ranks.agree([self._move_one(task, device) for task in moved])
        for task in tasks:
            task.on_device = device is not HOST
        failed = [(task, error) for task, error in zip(moved, errors, strict=True) if error is not None]
        for task, error in failed:
            self._end(task, error)
        return [task for task, _ in failed]

    def _move_one(self, task: Task, device: torch.device) -> Exception | None:
        try:
            with torch.inference_mode():
                move(task.execution.req, device)
        except Exception as error:  # a request's boundary: what has no room ends alone
            self._check_fatal(error)
            return error
        return None

    def _end(self, task: Task, error: Exception | None = None) -> None:
        task.execution.close()
        task.done, task.error, task.on_device = True, error, False
        self.tasks.remove(task)
        if is_out_of_memory(error):
            free_memory()


def part_of(task: Task, steps_left: int) -> Part:
    """Return what a unit was for a task that had so many steps left before."""
    succeeded = task.error is None
    return Part(succeeded and task.steps_left < steps_left, not steps_left, succeeded and task.done)


def free_memory() -> None:
    """Give back what a failed unit left behind."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
