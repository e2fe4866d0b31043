"""`Execution`: one request under way, driven a unit at a time; and what drives one to its end."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Self

import torch

from safelight.core.device import Span, begin_span
from safelight.core.form import EAGER, Form
from safelight.core.model_runner import Forward, ModelRunner, resident
from safelight.core.pipeline import ComposedPipeline
from safelight.core.request import Req
from safelight.core.trees import Tree


class Execution:
    """One request under way: its generator, driven a unit at a time.

    A unit is what lies between two yields: the model calls that are pending, and what the pipeline makes of them.
    Between units every tensor of the request is in the `Req`, so it may be moved, kept waiting, or closed.

    A device may do its work after the host has given it. The host is ahead by one unit of a request at most, so that
    closing one stops the work within a step; at the end of a stage the device has done everything.

    Args:
        pipeline: whose request it is.
        req: the request.
        runner: makes its calls; as the modules are, if None.
        begin: begins the span of a unit, from which the time of each stage is told; the device's unless given.

    Attributes:
        req: the request.
        pipeline: whose request it is.
        runner: makes its calls.
        started: whether its first unit has begun.
        form: in which form its calls are made; set before its first unit, so that all are made alike.

    """

    def __init__(
        self,
        pipeline: ComposedPipeline,
        req: Req,
        runner: ModelRunner | None = None,
        begin: Callable[[], Span] | None = None,
    ) -> None:
        self.req = req
        self.form = EAGER
        self.pipeline = pipeline
        self.runner = runner or ModelRunner(pipeline, [resident(pipeline)])
        self._steps = pipeline.run(req)
        self._begin = begin or functools.partial(begin_span, pipeline.device)
        self._under_way: deque[tuple[str, Span]] = deque()
        self.started = False

    def forwards(self) -> list[Forward]:
        """Return the pending calls, as they are to be made."""
        return [Forward(call, (self.req,), self.form) for call in self.req.pending]

    def advance(self, results: Sequence[Tree] | None = None) -> bool:
        """Do one unit of work; False when the request is done.

        Args:
            results: of the pending calls, where the driver has made them; otherwise they are made here.

        Raises:
            Exception: whatever the unit raised; the generator is finished then, and holds nothing any more.

        """
        stage, span = self.req.stage, self._begin()
        more = False
        try:
            with torch.inference_mode(), panics_as_errors(), suppress(StopIteration):
                if results is None:
                    results = self.runner.run(self.forwards())
                self.req.pending = []
                self.req.pending = self._steps.send(list(results) if self.started else None)  # type: ignore[arg-type]
                more = True
        finally:
            self.started = True
            if not more:
                self.close()
            span.end()
            self._under_way.append((stage, span))
            stage_is_over = self.req.stage != stage or not self.req.pending
            self._catch_up(0 if stage_is_over else 1)
        return more

    def close(self) -> None:
        """Stop the request where it stands; closing twice does nothing."""
        with torch.inference_mode():
            self._steps.close()
        self.req.pending = []

    def __enter__(self) -> Self:
        """Return itself: leaving the block closes it."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """Close."""
        self.close()

    def _catch_up(self, ahead: int) -> None:
        """Wait for the device until it is behind by so many units, and charge each that it has done to its stage."""
        while len(self._under_way) > ahead:
            stage, span = self._under_way.popleft()
            seconds = span.wait()
            if stage:
                self.req.timings[stage] = self.req.timings.get(stage, 0.0) + seconds


@contextmanager
def panics_as_errors() -> Iterator[None]:
    """Raise what compiled code panics with (a tokenizer's does) as an error, which ends its request alone."""
    try:
        yield
    except (Exception, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as panic:
        raise RuntimeError(f"compiled code panicked: {panic}") from panic


class SyncExecutor:
    """Drives one request to its end, in this thread.

    Args:
        pipeline: whose requests they are.
        runner: makes their calls; as the modules are, if None.
        form: in which form.

    """

    def __init__(self, pipeline: ComposedPipeline, runner: ModelRunner | None = None, form: Form | None = None) -> None:
        self.pipeline = pipeline
        self._runner = runner
        self._form = form or EAGER

    def execute(self, req: Req) -> Generator[Req, None, None]:
        """Drive a request to its end, yielding after each unit. Closing the iterator stops the work."""
        with Execution(self.pipeline, req, self._runner) as execution:
            execution.form = self._form
            while execution.advance():
                yield req
