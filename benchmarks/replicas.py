"""What choosing a replica by cost saves: makespan of a mixed load by least outstanding cost and by turns.

Three replicas, each a worker of its own, of a model whose step takes a known time in proportion to its latent tokens.
Each load is short pictures and long videos in random order, sent at once or at random times; both ways of choosing
serve it in the same run on the same workers, A B B A. A makespan is the seconds from the first request to the last
answer; `bound` is the work that there is, shared evenly, which no way of choosing can beat.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.common import begin, print_table
from safelight import ServerArgs
from safelight.preparation import prepare
from safelight.runtime.client import GenerationRequest
from safelight.runtime.settings import EngineSettings
from safelight.runtime.supervisor.replicas import ReplicaSet
from safelight.runtime.supervisor.supervisor import Supervisor
from tests.live_server import FAULT, fault_model

NUM_REPLICAS = 3
STEP_SECONDS = 0.01
"""Of a picture; a step of a video has `VIDEO_TOKENS` times its tokens."""
VIDEO_FRAMES = 17
VIDEO_TOKENS = 5
IMAGE_STEPS = 4
VIDEO_STEPS = 20
VIDEO_SHARE = 0.25


class ByTurns(ReplicaSet):
    """What least cost is compared with: each replica in its turn. It has the replicas of another set, which keeps them.

    Args:
        shared: the other set, started.

    """

    def __init__(self, shared: ReplicaSet) -> None:
        super().__init__(shared.settings, 0)
        self.replicas, self._phase = shared.replicas, "ready"
        self._turns = itertools.cycle(self.replicas)

    def _choose(self) -> Supervisor:
        return next(self._turns)


@dataclass(frozen=True)
class Load:
    """Requests, and when they come.

    Attributes:
        is_video: of each request, whether it is a video; a picture otherwise.
        arrivals: of each, in seconds from the first.

    """

    is_video: list[bool]
    arrivals: list[float]

    @property
    def bound(self) -> float:
        """The seconds that the steps take on all replicas, shared evenly, once the first request has come."""
        units = sum(VIDEO_STEPS * VIDEO_TOKENS if video else IMAGE_STEPS for video in self.is_video)
        return units * STEP_SECONDS / NUM_REPLICAS


def draw_load(seed: int, num_requests: int, is_spread: bool) -> Load:
    """Return a load: a fixed share of videos in random order, all at once or over half of the time that it takes."""
    rng = np.random.default_rng(seed)
    is_video = [index < VIDEO_SHARE * num_requests for index in rng.permutation(num_requests)]
    load = Load(is_video, [0.0] * num_requests)
    if not is_spread:
        return load
    return Load(is_video, [0.0, *sorted(rng.uniform(0, load.bound / 2, num_requests - 1))])


async def makespan(replicas: ReplicaSet, load: Load, name: str) -> float:
    """Send a load, and return the seconds until its last answer."""
    assert replicas.schema is not None
    begun, tickets = time.monotonic(), []
    for index, (is_video, arrival) in enumerate(zip(load.is_video, load.arrivals, strict=True)):
        await asyncio.sleep(max(0.0, begun + arrival - time.monotonic()))
        fields = {
            "prompt": "a cat",
            "seed": index,
            "num_frames": VIDEO_FRAMES if is_video else 1,
            "num_inference_steps": VIDEO_STEPS if is_video else IMAGE_STEPS,
        }
        params, _ = prepare(replicas.schema, fields)
        tickets.append(replicas.submit(GenerationRequest(f"{name}-{index}", params)))
    for ticket in tickets:
        await ticket.result()
    return time.monotonic() - begun


async def compare(folder: Path, num_seeds: int, num_requests: int) -> None:
    """Run all loads on workers that both ways of choosing share, and print the table."""
    args = ServerArgs(str(fault_model(folder / "model", "FaultVideoPipeline", STEP_SECONDS)), device="cpu")
    settings = EngineSettings(server_args=args, max_waiting=10_000)
    least = ReplicaSet(settings, NUM_REPLICAS)
    await least.start()
    turns = ByTurns(least)
    ratios, rows = [], []
    try:
        for is_spread, seed in itertools.product((False, True), range(num_seeds)):
            load = draw_load(seed, num_requests, is_spread)
            sides: dict[ReplicaSet, list[float]] = {least: [], turns: []}
            for run, side in enumerate((least, turns, turns, least)):
                sides[side].append(await makespan(side, load, f"{is_spread}-{seed}-{run}"))
            ours, theirs = (statistics.mean(times) for times in sides.values())
            ratios.append(ours / theirs)
            spread = "spread" if is_spread else "at once"
            rows.append((spread, str(seed), f"{load.bound:.2f}", f"{ours:.2f}", f"{theirs:.2f}", f"{ratios[-1]:.2f}"))
    finally:
        await least.close()
    print_table(("arrivals", "seed", "bound, s", "least cost, s", "by turns, s", "ratio"), rows)
    mean = statistics.mean(ratios)
    print(f"makespan by least cost: {1 - mean:.0%} shorter on average, {1 - max(ratios):.0%} to {1 - min(ratios):.0%}")


def main() -> None:
    """Print the table."""
    arguments = begin(argparse.ArgumentParser(description=__doc__.partition("\n")[0]))
    sys.path.insert(0, str(FAULT))  # the stub model's family is registered here, and in the workers
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(FAULT), os.environ.get("PYTHONPATH"))))
    num_seeds, num_requests = (2, 16) if arguments.quick else (5, 32)
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(compare(Path(folder), num_seeds, num_requests))


if __name__ == "__main__":
    main()
