"""The compiled form of a whole pipeline's model calls: what it is made from, how it is made, and when it is there."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections import deque
from collections.abc import Container, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Literal, Protocol

import torch

from safelight.acceleration.blocks import one_block_each, repeated_blocks
from safelight.acceleration.compile import (
    BlockClass,
    compile_blocks,
    compiling,
    in_form,
    missing_toolchain,
    use_cache,
    warm_up_compiler,
)
from safelight.core.calls import ModelCall
from safelight.core.executor import Execution
from safelight.core.model_runner import Forward, Make
from safelight.core.pipeline import ComposedPipeline
from safelight.core.request import Req
from safelight.core.trees import Tree, map_tree
from safelight.errors import CompilationError, InvalidParameterError, UsageError
from safelight.preparation import warm_up_params

logger = logging.getLogger(__name__)

State = Literal["pending", "ready", "failed"]


class CacheFiller(Protocol):
    """Something that compiles elsewhere, into the cache."""

    def poll(self) -> str | None:
        """Return None while it works, then why it failed; an empty string if it did not."""


class Compilation:
    """Makes the compiled form of a pipeline a unit at a time, and makes model calls in it.

    A unit is one class of blocks in one canonical call: Dynamo traces it, Inductor compiles it, or finds it compiled.

    Args:
        pipeline: the loaded model.
        stacked: whether calls of several rows will come too.

    Attributes:
        state: whether the compiled form is there.
        reason: why it cannot be had, where it has failed.
        num_done: units that are done.
        filler: what fills the cache first, elsewhere; None compiles here.

    Raises:
        InvalidParameterError: if the model names no repeated blocks.

    """

    def __init__(self, pipeline: ComposedPipeline, stacked: bool = False) -> None:
        self.pipeline = pipeline
        self.state: State = "pending"
        self.reason = ""
        self._stacked = stacked
        plans = {name: module for name, module in pipeline.denoisers().items() if repeated_blocks(module)}
        if not plans:
            takes = f"none for this model: {pipeline.schema.pipeline_name} has no network whose class names its blocks"
            raise InvalidParameterError("compile", "blocks", takes)
        use_cache()
        self._classes: Mapping[str, Sequence[BlockClass]] = {name: compile_blocks(m) for name, m in plans.items()}
        self.num_done = 0
        self.filler: CacheFiller | None = None
        self._units: deque[tuple[ModelCall, BlockClass]] | None = None
        self._threads = torch.get_num_threads()

    def check_toolchain(self) -> None:
        """Refuse to go on where nothing can be compiled.

        Raises:
            InvalidParameterError: naming what is missing.

        """
        missing = missing_toolchain(self.pipeline.device.type)
        if missing is not None:
            raise InvalidParameterError("compile", "blocks", f"none here: compiling needs {missing}")

    @functools.cached_property
    def calls(self) -> list[ModelCall]:
        """The canonical calls, for every component that is compiled.

        Raises:
            CompilationError: if the model refuses the small requests that they are of.

        """
        try:
            calls = first_calls(self.pipeline, canonical_request(self.pipeline), self._classes)
        except UsageError as error:
            raise CompilationError(f"the model refuses the small request that it is compiled for: {error}") from error
        own = {call.component for call in calls}
        each = [*calls]
        for name in self._classes.keys() - own:  # of alternates, what one is given all may be
            alike = self.pipeline.alternates if name in self.pipeline.alternates else ()
            each += [dataclasses.replace(call, component=name) for call in calls if call.component in alike]
        stacked = each if self._stacked and self.pipeline.native else []
        return [*each, *map(doubled, stacked)]

    def is_due(self) -> bool:
        """Say whether the next unit can be done: not while the cache is being filled elsewhere."""
        if self.filler is not None:
            reason = self.filler.poll()
            if reason is None:
                return False
            self.filler = None
            if reason:
                self.fail(reason)
        return self.state == "pending"

    def advance(self) -> bool:
        """Do one unit; False when there is none left, or when it failed."""
        self.num_done += 1
        try:
            if self._units is None:
                warm_up_compiler()
                self._units = deque((call, each) for call in self.calls for each in self._classes[call.component])
            elif self._units:
                call, each = self._units.popleft()
                with torch.inference_mode():
                    self.pipeline.residency.bring([call.component])
                    with as_few_blocks(self.pipeline, call.component), compiling([each]):
                        self.pipeline.forward(call)
        except CompilationError as error:
            self.fail(str(error))
        else:
            if not self._units:
                self.state = "ready"
        return self.state == "pending"

    def finish(self) -> None:
        """Do every unit that is left; all of them again where the number of threads, which graphs hold, has changed.

        Raises:
            InvalidParameterError: if this machine cannot compile.
            CompilationError: if the model cannot be compiled.

        """
        if self._threads != torch.get_num_threads():
            self._threads, self._units, self.state = torch.get_num_threads(), None, "pending"
        if self.state == "pending":
            self.check_toolchain()
            while self.advance():
                pass
        if self.state == "failed":
            raise CompilationError(self.reason)

    def fail(self, reason: str) -> None:
        """Give up; everything runs eagerly from now on."""
        self.state, self.reason = "failed", reason

    def __call__(self, forwards: Sequence[Forward], make: Make) -> list[Tree]:
        """Make forwards, those of compiled requests by the compiled blocks."""
        made = []
        for forward in forwards:
            compiled = forward.form.mode == "compiled"
            with in_form(self._classes.get(forward.call.component, ()) if compiled else (), "compiled"):
                made += make([forward])
        return made


def canonical_request(pipeline: ComposedPipeline) -> Req:
    """Return the smallest request that a model takes."""
    return Req("compile", warm_up_params(pipeline.schema).split()[0])


def first_calls(pipeline: ComposedPipeline, req: Req, names: Container[str]) -> list[ModelCall]:
    """Return the model calls of a request's first step that each of the networks named has, and end it there.

    All calls of a step of ours come at once. Of another pipeline's request, which is small, all is run.
    """
    found: list[ModelCall] = []
    first: dict[str, int] = {}
    with Execution(pipeline, req) as execution:
        while execution.advance():
            for call in req.pending:
                is_forward = call.component in names and call.method == "forward"
                if is_forward and first.setdefault(call.component, call.key.step) == call.key.step:
                    found.append(call)
            if found and pipeline.native:
                break
    assert found, "a model whose blocks are compiled has a loop"
    return found


def as_few_blocks(pipeline: ComposedPipeline, component: str) -> AbstractContextManager[None]:
    """Leave a network one block of each list for one call, where they are alike."""
    return one_block_each(pipeline.get_module(component)) if pipeline.native else nullcontext()


def doubled(call: ModelCall) -> ModelCall:
    """Return a call with all rows twice."""
    kwargs = map_tree(dict(call.kwargs), lambda rows: torch.cat([rows, rows]))
    return dataclasses.replace(call, kwargs=kwargs)
