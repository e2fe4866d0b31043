"""Two clocks: one for people, which is set, by hand or over the network; and one for durations, which is not.

No duration is a difference of two stamps of the first. Imports no torch.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec

_BOOT, _NAMESPACE = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/time")


class Moment(msgspec.Struct, frozen=True):
    """A point in time on a clock that nobody sets.

    Attributes:
        clock: which one: it begins anew when the machine does. Moments of two clocks cannot be compared.
        seconds: since it began; while the machine sleeps as well.

    """

    clock: str
    seconds: float

    def since(self, earlier: Moment | None) -> float | None:
        """Return the seconds between two moments; None where that is not known."""
        if earlier is None or earlier.clock != self.clock or earlier.seconds > self.seconds:
            return None
        return self.seconds - earlier.seconds


def machine_moments() -> Callable[[], Moment]:
    """Return this machine's clock, which goes on through a restart of the server.

    Where the system does not name its start, the clock is this process's own.
    """
    with suppress(OSError, AttributeError):  # no Linux
        clock = f"{_BOOT.read_text().strip()} {_NAMESPACE.readlink()}"
        time.clock_gettime(time.CLOCK_BOOTTIME)
        return lambda: Moment(clock, time.clock_gettime(time.CLOCK_BOOTTIME))
    own = secrets.token_hex(16)
    return lambda: Moment(own, time.monotonic())


@dataclass(frozen=True)
class Clocks:
    """What a server goes by.

    Attributes:
        stamp: seconds since 1970, for people.
        moment: for durations.

    """

    stamp: Callable[[], float] = time.time
    moment: Callable[[], Moment] = machine_moments()  # noqa: RUF009 (one clock for all)
