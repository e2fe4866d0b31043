"""How a pipeline's model calls are made: by mode, as its settings say."""

from __future__ import annotations

import functools

from safelight.acceleration.compilation import Compilation
from safelight.acceleration.graphs import StepGraphs, refuse_graphs
from safelight.core.executor import make_call
from safelight.core.pipeline import ComposedPipeline
from safelight.core.request import CallMaker
from safelight.core.server_args import Mode


class Callers:
    """The makers of a pipeline's calls.

    Args:
        pipeline: the loaded model, with its settings.
        stacked: whether calls of several requests are made as one.

    Attributes:
        compilation: the compiled form; None where the settings have none.

    Raises:
        InvalidParameterError: if the model or the device cannot have what the settings say.

    """

    def __init__(self, pipeline: ComposedPipeline, stacked: bool = False) -> None:
        args = pipeline.server_args
        self.compilation = Compilation(pipeline, stacked) if args.compile == "blocks" else None
        eager: CallMaker = functools.partial(make_call, pipeline)
        compiled = self.compilation.make_call if self.compilation is not None else eager
        self._makers: dict[Mode, CallMaker] = {"eager": eager, "compiled": compiled}
        if args.cuda_graphs == "steps":
            refuse_graphs(pipeline)
            graphs = StepGraphs(pipeline.device)
            self._makers = {"eager": graphs.of(eager), "compiled": graphs.of(compiled)}

    @property
    def mode(self) -> Mode:
        """The mode of what begins now."""
        return "compiled" if self.compilation is not None and self.compilation.state == "ready" else "eager"

    def of(self, mode: Mode) -> CallMaker:
        """Return the maker of a mode."""
        return self._makers[mode]

    def finished(self) -> CallMaker:
        """Compile now, where the settings say so, and return the maker of everything that begins.

        Raises:
            InvalidParameterError: if this machine cannot compile.
            CompilationError: if the model cannot be compiled.

        """
        if self.compilation is not None:
            self.compilation.finish()
        return self.of(self.mode)
