"""The mesh: which ranks share what, with a communicator for each axis."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from safelight.errors import InvalidParameterError
from safelight.parallel.collectives import Communicator, Traffic
from safelight.parallel.layout import AXES, ParallelLayout

DEFAULT_TIMEOUT = timedelta(minutes=10)
"""After which a collective whose partner does not come fails."""


@dataclass(frozen=True)
class Mesh:
    """All ranks of one request, as this one sees them.

    Attributes:
        layout: the sizes of the axes.
        cfg, ring, ulysses, tp: this rank's communicator along each axis.
        sequence: along ring and Ulysses together: the ranks that have tokens of one forward.
        world: all ranks; VAE bands lie along it.
        control: all ranks, over the host and in a process group of its own: plans and votes.

    """

    layout: ParallelLayout
    cfg: Communicator
    ring: Communicator
    ulysses: Communicator
    tp: Communicator
    sequence: Communicator
    world: Communicator
    control: Communicator

    def traffic(self) -> dict[str, Traffic]:
        """Return what this rank has sent over each axis."""
        axes = (self.cfg, self.ring, self.ulysses, self.tp, self.sequence, self.world, self.control)
        return {communicator.axis: communicator.traffic for communicator in axes}


def build_mesh(layout: ParallelLayout, timeout: timedelta = DEFAULT_TIMEOUT) -> Mesh:
    """Build the mesh over the initialised process group; every rank calls it, with the same arguments.

    Args:
        layout: the sizes; their product is the number of ranks.
        timeout: of every collective.

    Raises:
        InvalidParameterError: if there are more or fewer ranks.

    """
    if layout.num_devices != dist.get_world_size():
        takes = f"{layout.num_devices}, the product of {' x '.join(map(str, layout.sizes))} ({' x '.join(AXES)})"
        raise InvalidParameterError("devices", dist.get_world_size(), takes)
    ranks = torch.arange(layout.num_devices).view(layout.sizes)
    axes = {axis: _communicator(axis, ranks.movedim(i, -1), timeout) for i, axis in enumerate(AXES)}
    # Tokens lie in the order ring, then Ulysses: what one Ulysses group has is in one piece.
    sequence = _communicator("sequence", ranks.movedim(-1, 1).flatten(2), timeout)
    world = _communicator("world", ranks.flatten(), timeout)
    control = _communicator("control", ranks.flatten(), timeout, backend="gloo")
    return Mesh(layout, **axes, sequence=sequence, world=world, control=control)


def lone_mesh() -> Mesh:
    """Return the mesh of one device, for which no process group is needed."""
    names = (*AXES, "sequence", "world", "control")
    return Mesh(ParallelLayout(), **{name: Communicator(name) for name in names})


def _communicator(axis: str, ranks: torch.Tensor, timeout: timedelta, backend: str | None = None) -> Communicator:
    """Return this rank's communicator of those along the last dimension.

    Every rank makes every group, in the same order: torch asks for it.
    """
    own = None
    for row in ranks.reshape(-1, ranks.shape[-1]).tolist():
        group = dist.new_group(row, timeout=timeout, backend=backend)
        if dist.get_rank() in row:
            own = Communicator(axis, row, group)
    assert own is not None
    return own
