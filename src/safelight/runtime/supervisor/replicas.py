"""Several workers of one model behind one client: each request goes where the least work is left. Imports no torch."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

from safelight.core.schema import ModelSchema
from safelight.errors import NotReadyError, QueueFullError
from safelight.runtime.client import EngineClient, EngineStats, GenerationRequest, State, Ticket, untold
from safelight.runtime.settings import EngineSettings
from safelight.runtime.supervisor.supervisor import Supervisor


class ReplicaSet(EngineClient):
    """Replicas of one model, each a supervisor with a worker of its own.

    A request goes to the ready replica with the least outstanding cost: what a request takes is known before it runs
    (`runtime/cost.py`), and a video costs as much as hundreds of pictures, so that counting requests, or taking turns,
    would leave replicas idle beside one that has two videos. A replica whose worker is lost gives the requests that
    are not blamed for it to the others, and takes new ones once it has another worker. One that gave up is left out.

    Args:
        settings: of each replica; `max_waiting` bounds the requests that wait at all of them together.
        num_replicas: how many, at least 1. On GPUs each has devices of its own, one replica's after another's.

    Attributes:
        replicas: the supervisors.
        gave_up: whether all of them gave up.
        on_compiled: told, for each worker, that the model is compiled, by an empty string; or why it is not.

    """

    def __init__(self, settings: EngineSettings, num_replicas: int) -> None:
        self.settings = settings
        self.gave_up = asyncio.Event()
        self.on_compiled: Callable[[str], None] = untold
        self._phase: State = "loading"
        num_devices = settings.server_args.num_devices()
        self.replicas = [
            Supervisor(replace(settings, first_device=settings.first_device + index * num_devices))
            for index in range(num_replicas)
        ]
        for replica in self.replicas:
            replica.on_step = lambda seconds, batch_size: self.on_step(seconds, batch_size)
            replica.on_compiled = lambda reason: self.on_compiled(reason)
            replica.on_lost = self._lost
            replica.on_gave_up = self._gave_up

    @property
    def schema(self) -> ModelSchema | None:
        """What the model takes; None until it has been loaded once."""
        return next((replica.schema for replica in self.replicas if replica.schema is not None), None)

    @property
    def state(self) -> State:
        """Whether it works: `ready` when all replicas have been loaded, and then while any of them is."""
        if self._phase != "ready":
            return self._phase
        states = {replica.state for replica in self.replicas}
        return "ready" if "ready" in states else "restarting" if "restarting" in states else "failed"

    @property
    def stats(self) -> EngineStats:
        """Figures for metrics, of all replicas together; they load beside each other."""
        each = [replica.stats for replica in self.replicas]
        usable = [replica.stats for replica in self.replicas if replica.state != "failed"]
        return EngineStats(
            num_running=sum(stats.num_running for stats in each),
            num_waiting=sum(stats.num_waiting for stats in each),
            device_memory_bytes=sum(stats.device_memory_bytes for stats in each),
            load_seconds=max(stats.load_seconds for stats in each),
            warm_up_seconds=min(stats.warm_up_seconds for stats in each),
            num_restarts=sum(stats.num_restarts for stats in each),
            compiled=bool(usable) and all(stats.compiled for stats in usable),
            cost_seconds=min((stats.cost_seconds for stats in each if stats.cost_seconds), default=0.0),
        )

    async def start(self) -> None:
        """Start all workers at once, and wait until each has loaded the model.

        All and not the first: a replica that cannot be loaded, as where there are too few GPUs, is a setting that is
        refused before any request is taken.

        Raises:
            SafelightError: why one cannot be loaded, with the exit code.

        """
        starting = [asyncio.create_task(replica.start()) for replica in self.replicas]
        try:
            await asyncio.wait(starting, return_when=asyncio.FIRST_EXCEPTION)
            for task in starting:
                if task.done():
                    task.result()
        except BaseException:
            for replica, task in zip(self.replicas, starting, strict=True):
                if replica.state == "loading":  # one that failed closes itself already, which must not be cut short
                    task.cancel()
            await asyncio.gather(*starting, return_exceptions=True)
            await self.close()
            raise
        if self._phase == "loading":
            self._phase = "ready"

    async def close(self) -> None:
        """Stop all workers; whoever still waits is told so."""
        self.drain()
        for replica in self.replicas:
            replica.on_lost = untold  # from here on each answers for its own
        await asyncio.gather(*(replica.close() for replica in self.replicas))

    def drain(self) -> None:
        """Take no more requests; those that were taken go on, at another replica if theirs is lost."""
        self._phase = "draining"

    def submit(self, request: GenerationRequest) -> Ticket:
        """Give a request to the replica that has the least to do. It ends in exactly one answer.

        Raises:
            QueueFullError: if as many wait as may.
            NotReadyError: if the model is not loaded, or the server stops.

        """
        replica = self._choose()
        if self._phase != "ready" or replica is None:
            raise NotReadyError(f"the model is not ready ({self.state})")
        if self.stats.num_waiting >= self.settings.max_waiting:
            raise QueueFullError(f"{self.settings.max_waiting} requests wait already; try again later")
        return replica.submit(request)

    def cancel(self, request_id: str) -> None:
        """End a request within one step, with `CancelledError`; nothing happens if it is done, or unknown."""
        for replica in self.replicas:
            replica.cancel(request_id)

    def _choose(self) -> Supervisor | None:
        """Return the replica with the least outstanding cost, of those that are ready, or else of those that will be.

        None where all gave up.
        """
        for state in ("ready", "restarting"):
            found = [replica for replica in self.replicas if replica.state == state]
            if found:
                return min(found, key=lambda replica: replica.outstanding_cost)
        return None

    def _lost(self, lost: Supervisor) -> None:
        """Give what a replica cannot go on with to the others; without others it waits for the next worker."""
        if self._choose() is not None:
            for live in lost.withdraw():
                replica = self._choose()
                assert replica is not None
                replica.adopt(live)

    def _gave_up(self) -> None:
        """Note that a replica is left out from now on; without any, the set is over."""
        if all(replica.state == "failed" for replica in self.replicas):
            self.gave_up.set()
