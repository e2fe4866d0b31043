"""`ModelCall`: a forward that a pipeline asks for, and that whoever drives it has made."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from safelight.core.trees import Tree, leaves


class CallKey(NamedTuple):
    """Names a model call.

    Attributes:
        output: whose it is: one output of one request, of which each has a name of its own.
        branch: the guidance branch, or what else the stage tells its calls apart by.
        step: the step that it is of, from 0.

    """

    output: str
    branch: str
    step: int


@dataclass(frozen=True, eq=False)
class ModelCall:
    """One forward of a component, asked for by a pipeline and made by whoever drives it.

    Its arguments and its result are trees of tensors; the result belongs to the request.

    Attributes:
        component: name of the component; whoever makes the call knows what it is.
        kwargs: arguments that have a batch dimension, which comes first.
        shared_kwargs: arguments that have none.
        signature: Python values; calls of one component with equal signatures may be made as one, their rows behind
            each other. None for a call that is always made alone.
        key: which call it is.
        static: arguments that are no tensors; calls that are made as one have equal ones.
        method: of the component, by the name that the pipeline gives it; `forward` is the module's own.
        model: whose component it is, where an engine has several models; its first is the empty name.

    """

    component: str
    kwargs: Mapping[str, Tree]
    shared_kwargs: Mapping[str, Tree]
    signature: tuple[Hashable, ...] | None
    key: CallKey
    static: Mapping[str, Hashable] = field(default_factory=dict)
    method: str = "forward"
    model: str = ""

    @property
    def num_rows(self) -> int:
        """The size of the batch dimension."""
        return next(leaves(dict(self.kwargs))).shape[0]

    @property
    def stack_key(self) -> Hashable | None:
        """What two calls must have in common to be made as one; None if this one is made alone."""
        if self.signature is None:
            return None
        return (self.model, self.component, self.method, self.signature, tuple(sorted(self.static.items())))
