"""`Form`: in which form a request's model calls are made. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Mode = Literal["eager", "compiled"]


@dataclass(frozen=True)
class Form:
    """How a request's model calls are made: chosen when it begins, and kept to its end, wherever it runs.

    Attributes:
        mode: as the modules are, or by their compiled blocks.

    """

    mode: Mode = "eager"


EAGER = Form()
