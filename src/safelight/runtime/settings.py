"""What a supervisor and its workers are told once. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from safelight.core.server_args import ServerArgs
from safelight.runtime.unit_board import UnitLimits


@dataclass(frozen=True)
class EngineSettings:
    """What an engine is told once, wherever it runs.

    Attributes:
        server_args: the engine's settings.
        model_name: what the model is called in schema and files; None leaves it the name that it was loaded by.
        max_running: outputs that hold device memory at most.
        max_waiting: requests that may wait.
        batching: `exact` or `throughput`.
        share: of device time that the longest request and the oldest get at least, each.
        warm_up: whether the worker runs one small request before it is ready.
        unit_limits: how long units of work may take.
        heartbeat_limit: seconds of silence after which a worker counts as stopped.
        is_first_of_torchrun: whether `torchrun` starts the other ranks, on this machine and on others.
        first_device: of the GPUs, counted from the one that `server_args` names.

    """

    server_args: ServerArgs = field(default_factory=ServerArgs)
    model_name: str | None = None
    max_running: int = 4
    max_waiting: int = 64
    batching: str = "exact"
    share: float = 0.1
    warm_up: bool = True
    unit_limits: UnitLimits = field(default_factory=UnitLimits)
    heartbeat_limit: float = 10.0
    is_first_of_torchrun: bool = False
    first_device: int = 0

    @property
    def num_ranks(self) -> int:
        """Processes that share every request."""
        return self.server_args.num_devices()
