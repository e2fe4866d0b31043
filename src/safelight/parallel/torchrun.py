"""What `torchrun` tells the processes that it starts. Importing this imports no torch."""

from __future__ import annotations

import os
from dataclasses import dataclass

from safelight.errors import UsageError


@dataclass(frozen=True)
class Launched:
    """The place of a process among those of one `torchrun`.

    Attributes:
        rank: from 0, over all machines.
        local_rank: from 0, on this machine.
        num_ranks: of all machines.

    """

    rank: int
    local_rank: int
    num_ranks: int


def launched(num_devices: int) -> Launched | None:
    """Return this process's place where `torchrun` started it; None where nothing did.

    Args:
        num_devices: for a request, as the settings say.

    Raises:
        UsageError: if `torchrun` has started another number of processes.

    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    found = Launched(*(int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")))
    if found.num_ranks != num_devices:
        raise UsageError(
            f"devices: torchrun started {found.num_ranks} processes, and the settings ask for {num_devices} devices"
        )
    return found
