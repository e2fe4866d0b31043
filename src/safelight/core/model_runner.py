"""`ModelRunner`: makes model calls. Whatever happens to a call on its way is one of a list of wrappers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from safelight.core.calls import ModelCall
from safelight.core.form import EAGER, Form
from safelight.core.trees import Tree

if TYPE_CHECKING:
    from safelight.core.pipeline import ComposedPipeline
    from safelight.core.request import Req


@dataclass(frozen=True, eq=False)
class Forward:
    """A model call on its way, with whose it is.

    Attributes:
        call: what is made.
        reqs: whose rows these are, in their order; several where calls were stacked.
        form: in which form it is made, the same for all of them.

    """

    call: ModelCall
    reqs: tuple[Req, ...]
    form: Form = EAGER


Make = Callable[[Sequence[Forward]], list[Tree]]
"""Makes forwards, and returns the result of each. Its caller is in `inference_mode`."""
Wrapper = Callable[[Sequence[Forward], Make], list[Tree]]
"""Something that happens to forwards on their way: given them, and what makes them from here on, it returns their
results. It may answer some itself, change them, join them, or do something around them; and keeps nothing of a request,
whose `stage_state` is the place for that."""


class ModelRunner:
    """Makes the calls of one model.

    Args:
        pipeline: the model.
        way: what happens to its calls, the outermost first; then the component runs.

    Attributes:
        run: makes calls, and returns the result of each, or raises what one of them raised.

    """

    def __init__(self, pipeline: ComposedPipeline, way: Sequence[Wrapper]) -> None:
        self.pipeline = pipeline
        self.way = tuple(way)
        self.run: Make = lambda forwards: [pipeline.forward(forward.call) for forward in forwards]
        for wrapper in reversed(self.way):
            self.run = behind(wrapper, self.run)
        self.run = torch.inference_mode()(self.run)

    @property
    def form(self) -> Form:
        """The form of what begins now."""
        return EAGER

    def has(self, form: Form) -> bool:
        """Say whether calls of a form can be made now."""
        return form in (EAGER, self.form)

    def may_have(self, form: Form) -> bool:
        """Say whether calls of a form can be made now, or may be later."""
        return self.has(form)


def behind(wrapper: Wrapper, make: Make) -> Make:
    """Return what makes forwards in a wrapper."""
    return lambda forwards: wrapper(forwards, make) if forwards else []


def resident(pipeline: ComposedPipeline) -> Wrapper:
    """Return a wrapper that has a model's components on the device before they run."""

    def bring(forwards: Sequence[Forward], make: Make) -> list[Tree]:
        results = []
        for forward in forwards:
            pipeline.residency.bring([forward.call.component])
            results += make([forward])
        return results

    return bring
