"""What the worker is doing, where its supervisor can read it, even after the worker's death. Imports no torch.

A small file that both processes map. It is written before every unit, so that a crash tells whose unit it was, and a
unit that takes too long is seen from outside.
"""

from __future__ import annotations

import mmap
import os
import struct
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec

from safelight.errors import PortError

SIZE = 8192
HEADER = struct.Struct("<QQ")
"""Times written (odd while a write is under way), and the length of what follows."""


class Unit(msgspec.Struct, frozen=True, array_like=True):
    """One unit of work.

    Attributes:
        kind: its stage.
        requests: whose work it is.
        started: seconds of the machine's monotonic clock.
        limit: seconds after which it counts as hung.

    """

    kind: str
    requests: tuple[str, ...]
    started: float
    limit: float

    def is_late(self) -> bool:
        """Say whether it takes longer than it may."""
        return time.monotonic() > self.started + self.limit


@dataclass(frozen=True)
class UnitLimits:
    """How long a unit may take.

    Attributes:
        least: seconds that every unit may take.
        medians: as many medians of its kind as it may take, where that is longer.
        first: seconds for the first of a kind, which may compile, or load.

    """

    least: float = 60.0
    medians: float = 20.0
    first: float = 1800.0

    def of(self, median: float | None) -> float:
        """Return the limit of a unit whose kind has this median; None is the first of its kind."""
        return self.first if median is None else max(self.least, self.medians * median)


class UnitBoard:
    """The mapped file. The worker writes, the supervisor reads.

    Args:
        path: of the file, which is made if it is not there.

    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            with path.open("a+b") as file:
                # Not a hole, which a full disk turns into a signal that ends whoever looks into it.
                os.posix_fallocate(file.fileno(), 0, SIZE)
                self._map = mmap.mmap(file.fileno(), SIZE)
        except OSError as error:
            reason = error.strerror or error
            raise PortError(f"TMPDIR: a worker's file cannot be made in {str(path.parent)!r}: {reason}") from error

    def write(self, unit: Unit | None) -> None:
        """Say what is begun; None is nothing."""
        data = msgspec.msgpack.encode(unit)
        if len(data) > SIZE - HEADER.size:
            assert unit is not None
            data = msgspec.msgpack.encode(Unit(unit.kind[:80], (), unit.started, unit.limit))
        count = HEADER.unpack_from(self._map)[0]
        HEADER.pack_into(self._map, 0, count | 1, len(data))
        self._map[HEADER.size : HEADER.size + len(data)] = data
        HEADER.pack_into(self._map, 0, (count | 1) + 1, len(data))

    def read(self) -> Unit | None:
        """Return what is being done; None is nothing."""
        for _ in range(100):
            count, length = HEADER.unpack_from(self._map)
            data = self._map[HEADER.size : HEADER.size + length]
            if count % 2 == 0 and HEADER.unpack_from(self._map)[0] == count:
                return msgspec.msgpack.decode(data, type=Unit | None) if length else None
        return None

    def remove(self) -> None:
        """Let go of the file, and delete it, if it is there."""
        self._map.close()
        with suppress(OSError):
            self._path.unlink()
