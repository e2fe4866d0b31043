"""Model calls of several requests as one forward: rows stacked along the batch dimension."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from safelight.core.request import CallMaker, ModelCall, Prediction

StackKey = tuple[str, tuple[Hashable, ...]]
Place = tuple[int, int]
"""Of a call: which request's, and which of its calls."""
RunCalls = Callable[[Sequence[ModelCall], CallMaker], list[Prediction]]


def stack_key(call: ModelCall) -> StackKey:
    """Return what two calls must have in common to be one forward."""
    return (call.component, call.signature)


def run_stacked(
    make: CallMaker, requests: Sequence[Sequence[ModelCall]], run_calls: RunCalls | None = None
) -> list[list[Prediction]]:
    """Make the calls of requests of one mode, those of one key in one forward; return each request's results.

    Args:
        make: makes a call.
        requests: the calls of each.
        run_calls: makes the calls of a step on several ranks, which share them: each branch is a forward of its own
            then. Ranks join results of one shape, so where forwards differ in their rows every rank makes all. None
            where branches are not shared.

    """
    groups: defaultdict[tuple[StackKey, str], list[Place]] = defaultdict(list)
    for index, calls in enumerate(requests):
        for position, call in enumerate(calls):
            groups[stack_key(call), call.key[1] if run_calls else ""].append((index, position))
    results: dict[Place, Prediction] = {}  # not by the calls' keys, which two outputs of a request have in common
    with torch.inference_mode():
        stacked = [stack([requests[index][position] for index, position in places]) for places in groups.values()]
        alike = len({call.num_rows for call in stacked}) == 1
        made = run_calls(stacked, make) if run_calls and alike else map(make, stacked)
        for places, result in zip(groups.values(), made, strict=True):
            sizes = [requests[index][position].num_rows for index, position in places]
            results.update(zip(places, split(result, sizes), strict=True))
    return [[results[index, position] for position in range(len(calls))] for index, calls in enumerate(requests)]


def stack(calls: Sequence[ModelCall]) -> ModelCall:
    """Return one call with the rows of all; they have one component and one signature."""
    first = calls[0]
    if len(calls) == 1:
        return first
    kwargs = {name: torch.cat([call.kwargs[name] for call in calls]) for name in first.kwargs}
    return ModelCall(first.component, kwargs, first.shared_kwargs, first.signature, first.key)


def split(result: Prediction, sizes: Sequence[int]) -> list[Prediction]:
    """Return each call's rows; copies, so that no request keeps another's alive."""
    if isinstance(result, Tensor):
        return [rows.clone() for rows in torch.split(result, list(sizes))]
    parts = [[rows.clone() for rows in torch.split(part, list(sizes))] for part in result]
    return list(zip(*parts, strict=True))
