"""What an attack is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from tests.reliability.attacker import Attacker

Prepared = Callable[[], None]


@dataclass(frozen=True)
class Attack:
    """One row of the table.

    Attributes:
        says: what is done.
        prepare: returns the attack itself, once all that it sends is made.
        answers: the statuses that it may be given; another one is a fault.
        shows: what must have happened so many times at least, or it was no attack.
        times: as long as others.

    """

    says: str
    prepare: Callable[[Attacker], Prepared]
    answers: frozenset[str]
    shows: Mapping[str, int] = field(default_factory=dict)
    times: float = 1.0
