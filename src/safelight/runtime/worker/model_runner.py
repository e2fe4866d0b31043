"""The way of a model call: all that happens to it, in the order in which it happens."""

from __future__ import annotations

from safelight.acceleration.compilation import Compilation
from safelight.acceleration.graphs import StepGraphs, refuse_graphs
from safelight.core.form import Form
from safelight.core.model_runner import ModelRunner, resident
from safelight.core.pipeline import ComposedPipeline
from safelight.runtime.worker.forward_estimator import ForwardEstimator
from safelight.runtime.worker.stacking import Stacking


class PipelineRunner(ModelRunner):
    """Makes a loaded model's calls, as its settings say.

    Args:
        pipeline: the loaded model, with its settings.
        stacked: whether calls of several requests are made as one.
        estimator: of several ranks, learns what forwards take; None without.

    Attributes:
        compilation: the compiled form; None where the settings have none.

    Raises:
        InvalidParameterError: if the model or the device cannot have what the settings say.

    """

    def __init__(
        self, pipeline: ComposedPipeline, stacked: bool = False, estimator: ForwardEstimator | None = None
    ) -> None:
        args, components = pipeline.server_args, pipeline.components
        self.compilation = Compilation(pipeline, stacked) if args.compile == "blocks" else None
        if args.cuda_graphs == "steps":
            refuse_graphs(pipeline)
        way = (
            *pipeline.wrappers(stacked),  # of a package's pipeline: kept encodings, calls that were proven to stack
            Stacking(apart=components.shares_branches) if stacked else None,  # rows of several requests: one call
            components.over_ranks,  # one call: on which ranks it is made, and how each has its result
            None if estimator is None else estimator.measured,  # on this rank: what it takes
            resident(pipeline),  # the component is on the device
            StepGraphs(pipeline.device) if args.cuda_graphs == "steps" else None,  # replayed, or recorded
            self.compilation,  # by compiled blocks, or eagerly
        )
        super().__init__(pipeline, [wrapper for wrapper in way if wrapper is not None])

    @property
    def form(self) -> Form:
        """The form of what begins now."""
        return Form("compiled" if self.compilation is not None and self.compilation.state == "ready" else "eager")

    def may_have(self, form: Form) -> bool:
        """Say whether calls of a form can be made now, or may be later."""
        compiles = self.compilation is not None and self.compilation.state != "failed"
        return form.mode == "eager" or compiles

    def finish_compiling(self) -> None:
        """Compile now, where the settings say so: everything that begins is compiled then.

        Raises:
            InvalidParameterError: if this machine cannot compile.
            CompilationError: if the model cannot be compiled.

        """
        if self.compilation is not None:
            self.compilation.finish()
