"""`PipelineStage`: one piece of a pipeline's work, which yields the model calls that it needs."""

from __future__ import annotations

from collections.abc import Generator, Sequence

from safelight.core.calls import ModelCall
from safelight.core.conditioning_cache import ConditioningCache
from safelight.core.request import Req
from safelight.core.server_args import ServerArgs
from safelight.core.trees import Tree

Steps = Generator[list[ModelCall], list[Tree], None]
"""Yields the calls of a step and is sent their results; an empty list is a boundary, and is sent an empty list."""


class PipelineStage:
    """One piece of work in `forward`, or in an overridden `run` that yields model calls. It keeps nothing of a request.

    What it needs between two yields lies in the request: where no field is made for it, in `stage_state`, as a
    dataclass of the stage's own, which is cleared when the stage ends.
    """

    cache: ConditioningCache = ConditioningCache(0)
    """What encoders made for earlier requests; the pipeline sets its own."""

    def parts(self) -> Sequence[PipelineStage]:
        """Return the stages that this one consists of, where it does."""
        return ()

    def forward(self, batch: Req, server_args: ServerArgs) -> Req:
        """Do the whole work of the stage on `batch`, in place, and return it."""
        raise NotImplementedError

    def run(self, batch: Req, server_args: ServerArgs) -> Steps:
        """Drive the stage; a stage that yields overrides this, and has no `forward`.

        At a yield, the frame holds no tensor that is not in the request too: whoever drives may move it.
        """
        returned = self.forward(batch, server_args)
        assert returned is batch, f"{type(self).__name__}.forward returned another request"
        yield from ()
