"""`PipelineStage`: one piece of a pipeline's work, or a loop that yields model calls."""

from __future__ import annotations

from collections.abc import Generator, Sequence

from torch import nn

from safelight.core.conditioning_cache import ConditioningCache
from safelight.core.request import ModelCall, Prediction, Req
from safelight.core.server_args import ServerArgs

Steps = Generator[list[ModelCall], list[Prediction], None]
"""Yields the calls of a step and is sent their results; an empty list is a boundary, and is sent an empty list."""


class PipelineStage:
    """One piece of work in `forward`, or a loop in an overridden `run`. A stage keeps nothing of a request."""

    cache: ConditioningCache = ConditioningCache(0)
    """What encoders made for earlier requests; the pipeline sets its own."""

    def parts(self) -> Sequence[PipelineStage]:
        """Return the stages that this one consists of, where it does."""
        return ()

    def needed_modules(self, batch: Req) -> Sequence[nn.Module]:
        """Return the modules that the next unit of this stage runs for a request.

        Whoever drives has them on the device. They follow from the request alone; those that calls name are not among
        them.
        """
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
