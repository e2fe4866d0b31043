"""Whether a forward fits into the memory that is left, before it begins."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence

from torch import nn

from safelight.acceleration.activations import Valueless, count_peak, on_meta
from safelight.acceleration.blocks import one_block_each
from safelight.core.calls import ModelCall
from safelight.core.model_runner import Forward, Make
from safelight.core.trees import Tree, map_tree
from safelight.runtime.worker.memory_gauge import Gauge

MAX_COUNTED = 4096
"""Calls whose size is remembered."""


class ForwardEstimator:
    """Says whether a forward fits.

    What one takes is counted on the component without its weights, undivided. How much of that this rank takes, which
    has its share of the work, is learnt from the largest forward so far: before the first, nothing is known, and
    nothing is refused.

    Args:
        gauge: of the memory in which forwards run.
        empty_components: by name, what makes a component on the meta device; of others nothing is known.

    """

    def __init__(self, gauge: Gauge, empty_components: Mapping[str, Callable[[], nn.Module]]) -> None:
        self._gauge = gauge
        self._make_empty = empty_components
        self._empty: dict[str, nn.Module] = {}
        self._counted: dict[Hashable, int] = {}
        self._largest: dict[str, tuple[int, float]] = {}

    def fits(self, call: ModelCall, num_stacked: int = 1) -> bool:
        """Say whether a forward fits into what is free now, of `num_stacked` calls like this one."""
        _, share = self._largest.get(call.component, (0, 0.0))
        return not share or share * self.count(call) * num_stacked <= self._gauge.free()

    def measured(self, forwards: Sequence[Forward], make: Make) -> list[Tree]:
        """Make forwards, and learn from what those of steps took."""
        return [self._measured(forward, make) for forward in forwards]

    def _measured(self, forward: Forward, make: Make) -> Tree:
        call = forward.call
        counted = 0 if call.signature is None else self.count(call)
        before = self._gauge.begin() if counted else 0
        (made,) = make([forward])
        if counted >= max(1, self._largest.get(call.component, (0, 0.0))[0]):
            # More than all of it is what a first forward of a process takes besides.
            self._largest[call.component] = (counted, min(1.0, (self._gauge.peak() - before) / counted))
        return made

    def count(self, call: ModelCall) -> int:
        """Return the bytes of activations that a call takes undivided; 0 where that cannot be known."""
        key = (call.stack_key, call.num_rows)
        if key not in self._counted:
            if len(self._counted) == MAX_COUNTED:
                self._counted.clear()
            self._counted[key] = self._count(call)
        return self._counted[key]

    def _count(self, call: ModelCall) -> int:
        if call.component not in self._make_empty:
            return 0
        if call.component not in self._empty:
            self._empty[call.component] = self._make_empty[call.component]()
        module = self._empty[call.component]
        kwargs = map_tree({**call.kwargs, **call.shared_kwargs}, on_meta)
        with Valueless(), one_block_each(module):  # one block after another takes what one takes
            return count_peak(lambda: module(**kwargs))
