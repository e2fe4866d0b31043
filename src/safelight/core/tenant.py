"""`Tenant`: whose a request is, where several share an engine. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tenant:
    """Whose a request is.

    Attributes:
        name: the same for all of its requests; empty is nobody's.
        share: of device time that its requests together get at least, as long as it has some, from 0 to 1.

    """

    name: str = ""
    share: float = 0.0


NOBODY = Tenant()
