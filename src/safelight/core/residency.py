"""Which of a pipeline's components lie on the device: each comes when a unit needs it, and leaves for another."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol


class Placement(Protocol):
    """How one component comes to the device and leaves it. Its weights keep their place on the host meanwhile."""

    @property
    def num_bytes(self) -> int:
        """Bytes that it takes on the device."""

    def enter(self) -> None:
        """Bring it to the device; if that fails, it is where it was."""

    def leave(self) -> None:
        """Let it go from the device."""


class Residency:
    """Brings the components that a unit needs to the device; for them the least recently used leave it.

    Args:
        placements: of the components that come and go; the others are where they run for good.
        rooms: for each of these, the bytes that placed components may take on the device while it runs, itself among
            them: the rest of the memory is for what it computes.

    Attributes:
        num_swaps: how often a component was brought.
        bytes_brought: the sum of their sizes.

    """

    def __init__(self, placements: Mapping[str, Placement], rooms: Mapping[str, int]) -> None:
        self._placements = placements
        self._rooms = rooms
        self._resident: dict[str, Placement] = {}
        """On the device; the least recently used first."""
        self.num_swaps = 0
        self.bytes_brought = 0

    @property
    def num_bytes(self) -> int:
        """Bytes that placed components take on the device now."""
        return sum(placement.num_bytes for placement in self._resident.values())

    def resident(self) -> tuple[str, ...]:
        """Return the placed components that are on the device, the least recently used first."""
        return tuple(self._resident)

    def is_resident(self, name: str) -> bool:
        """Say whether a component can run at once."""
        return name not in self._placements or name in self._resident

    def missing_bytes(self, names: Iterable[str]) -> int:
        """Return how many bytes more components take than those that leave for them; below 0 if it is less."""
        return sum(self._placements[name].num_bytes for name in names if name in self._placements) - self.num_bytes

    def bring(self, names: Iterable[str]) -> None:
        """Have components on the device at one time, with room for what they compute.

        Raises:
            Exception: whatever bringing one raised; what is on the device then is what can run.

        """
        asked = {name: self._placements[name] for name in names if name in self._placements}
        if not asked:
            return
        room = min(self._rooms[name] for name in asked)
        needed = sum(placement.num_bytes for placement in asked.values())
        for name in [name for name in self._resident if name not in asked]:
            others = sum(self._resident[other].num_bytes for other in self._resident if other not in asked)
            if needed + others <= room:
                break
            self._resident.pop(name).leave()
        for name, placement in asked.items():
            if self._resident.pop(name, None) is None:
                placement.enter()
                self.num_swaps += 1
                self.bytes_brought += placement.num_bytes
            self._resident[name] = placement

    def clear(self) -> None:
        """Let every placed component leave the device."""
        while self._resident:
            self._resident.popitem()[1].leave()
