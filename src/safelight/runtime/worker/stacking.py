"""Model calls of several requests as one: rows behind each other along the batch dimension."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import replace

import torch

from safelight.core.calls import ModelCall
from safelight.core.model_runner import Forward, Make
from safelight.core.trees import Tree, leaves, with_leaves


class Stacking:
    """A wrapper that makes calls of one key as one forward, and gives each its rows.

    Args:
        apart: whether each branch is a forward of its own all the same, because ranks make different branches.

    """

    def __init__(self, apart: bool = False) -> None:
        self._apart = apart

    def __call__(self, forwards: Sequence[Forward], make: Make) -> list[Tree]:
        """Make forwards that may be stacked, and have one form."""
        groups: defaultdict[Hashable, list[int]] = defaultdict(list)
        for place, forward in enumerate(forwards):
            key, branch = forward.call.stack_key, forward.call.key.branch if self._apart else ""
            groups[place if key is None else (key, forward.form, branch)].append(place)
        made = make([stacked([forwards[place] for place in places]) for places in groups.values()])
        results: dict[int, Tree] = {}
        for places, result in zip(groups.values(), made, strict=True):
            alone = len(places) == 1
            parts = [result] if alone else split(result, [forwards[place].call.num_rows for place in places])
            results.update(zip(places, parts, strict=True))
        return [results[place] for place in range(len(forwards))]


def stacked(forwards: Sequence[Forward]) -> Forward:
    """Return one forward with the rows of all; their calls have one key."""
    first = forwards[0]
    if len(forwards) == 1:
        return first
    call = stack([forward.call for forward in forwards])
    return Forward(call, tuple(req for forward in forwards for req in forward.reqs), first.form)


def stack(calls: Sequence[ModelCall]) -> ModelCall:
    """Return one call with the rows of all."""
    rows = zip(*(leaves(dict(sorted(call.kwargs.items()))) for call in calls), strict=True)
    kwargs = with_leaves(dict(sorted(calls[0].kwargs.items())), [torch.cat(each) for each in rows])
    return replace(calls[0], kwargs=kwargs)


def split(result: Tree, sizes: Sequence[int]) -> list[Tree]:
    """Return each call's rows of a result; copies, so that no request keeps another's alive."""
    pieces = [torch.split(tensor, list(sizes)) for tensor in leaves(result)]
    found = []
    for number in range(len(sizes)):
        found.append(with_leaves(result, [each[number].clone() for each in pieces]))
    return found
