"""The compiled form of a whole pipeline's model calls: what it is made from, how it is made, and when it is there."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections import deque
from collections.abc import Mapping, Sequence
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
            takes = f"none for this model: {pipeline.schema.pipeline_name} has no transformer that names its blocks"
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
            calls = first_calls(self.pipeline, canonical_request(self.pipeline))
        except UsageError as error:
            raise CompilationError(f"the model refuses the small request that it is compiled for: {error}") from error
        each = [dataclasses.replace(call, component=name) for call in calls for name in self._alike(call.component)]
        return [*each, *(doubled(call) for call in each)] if self._stacked else each

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
                    with one_block_each(self.pipeline.get_module(call.component)), compiling([each]):
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

    def _alike(self, component: str) -> list[str]:
        """Return the components that are given such calls: of alternates, all."""
        alternates = self.pipeline.alternates
        names = alternates if component in alternates else (component,)
        return [name for name in names if name in self._classes]


def canonical_request(pipeline: ComposedPipeline) -> Req:
    """Return the smallest request that a model takes."""
    return Req("compile", warm_up_params(pipeline.schema).split()[0])


def first_calls(pipeline: ComposedPipeline, req: Req) -> list[ModelCall]:
    """Return the model calls of a request's first step, one a guidance branch, and end it there."""
    with Execution(pipeline, req) as execution:
        while not req.in_loop:
            assert execution.advance(), "a model whose blocks are compiled has a loop"
        return list(req.pending)


def doubled(call: ModelCall) -> ModelCall:
    """Return a call with all rows twice."""
    kwargs = map_tree(dict(call.kwargs), lambda rows: torch.cat([rows, rows]))
    return dataclasses.replace(call, kwargs=kwargs)
