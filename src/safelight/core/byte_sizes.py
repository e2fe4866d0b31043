"""Sizes of memory, as people write them. Importing this imports no torch."""

from __future__ import annotations

import math
import re

from safelight.errors import InvalidParameterError

UNITS = {
    "": 1,
    "B": 1,
    **{f"{prefix}B": 1000**power for power, prefix in enumerate("kMGT", start=1)},
    **{f"{prefix}iB": 1024**power for power, prefix in enumerate("KMGT", start=1)},
}
BY_LOWER = {unit.lower(): factor for unit, factor in UNITS.items()}
MAX_BYTES = 2**63 - 1
PATTERN = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", re.ASCII)


def parse_size(value: int | str, field: str) -> int:
    """Return a size in bytes: a whole number, or a text such as `24GiB`, `500MB` or `1.5 GiB`; case does not matter.

    Args:
        value: the size.
        field: whose value it is, for the message.

    Raises:
        InvalidParameterError: if it is no size, or not above 0.

    """
    takes = f"bytes above 0, or a number with {', '.join(unit for unit in UNITS if unit)}, such as 24GiB"
    found = PATTERN.fullmatch(str(value).strip())
    if isinstance(value, bool) or found is None or found[2].lower() not in BY_LOWER:
        raise InvalidParameterError(field, value, takes)
    size = float(found[1]) * BY_LOWER[found[2].lower()] if found[2] or "." in found[1] else int(found[1])
    if not 1 <= size <= MAX_BYTES:
        raise InvalidParameterError(field, value, takes)
    return int(size)


def shown_size(num_bytes: int, up: bool = False) -> str:
    """Return a size for people, such as `22.17 GiB`.

    Args:
        num_bytes: the size.
        up: whether it is one that is needed: what is shown, given back, is then enough.

    """
    for power, prefix in ((3, "Gi"), (2, "Mi"), (1, "Ki")):
        if num_bytes >= 1024**power:
            hundredths = num_bytes * 100 / 1024**power
            return f"{(math.ceil(hundredths) if up else round(hundredths)) / 100:.2f} {prefix}B"
    return f"{num_bytes} B"
