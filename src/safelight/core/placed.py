"""Where values stand in lists inside each other, so that they can travel one by one. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

Place = tuple[int, ...]
"""The numbers by which a value is found in lists; empty where there is no list."""


def placed(value: Any, place: Place = ()) -> Iterator[tuple[Place, Any]]:
    """Yield what stands in lists and tuples, in order, each with its place."""
    if isinstance(value, list | tuple):
        for index, entry in enumerate(value):
            yield from placed(entry, (*place, index))
    else:
        yield place, value


def joined(values: Sequence[tuple[Place, Any]]) -> Any:
    """Return what `placed` took apart, with tuples for lists."""
    if not values[0][0]:
        return values[0][1]
    heads = dict.fromkeys(place[0] for place, _ in values)
    return tuple(joined([(place[1:], value) for place, value in values if place[0] == head]) for head in heads)
