"""Supervisors whose workers die at any moment: each request has one answer, and only who is to blame is lost."""

from __future__ import annotations

import asyncio
import random
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from safelight.errors import CancelledError, NotReadyError, WorkerLostError
from safelight.runtime.client import GenerationRequest
from safelight.runtime.messages import Cancel, Loaded, OutputMade, Progressed, Start, Stop, Submit, schema_to_wire
from safelight.runtime.settings import EngineSettings
from safelight.runtime.supervisor import supervisor as supervisor_module
from safelight.runtime.supervisor.group import Rank, WorkerGroup
from safelight.runtime.supervisor.replicas import ReplicaSet
from safelight.runtime.supervisor.supervisor import MAX_DEATHS, Supervisor
from safelight.runtime.unit_board import Unit, UnitBoard

SECONDS = 30.0


class Worker:
    """A worker's process and socket in one: does what it is told in any order, until it dies.

    Args:
        world: what all workers share.
        board: where it says whose unit runs.

    """

    def __init__(self, world, board):
        self.world, self.board = world, board
        self.inbox: asyncio.Queue[Any] = asyncio.Queue()
        self.outbox: asyncio.Queue[Any] = asyncio.Queue()
        self.pid, self.returncode = 1, None
        self._dead = asyncio.Event()
        self._work = asyncio.create_task(self._run())

    # As a process

    async def wait(self):
        await self._dead.wait()
        return self.returncode

    def send_signal(self, number):
        self._die(-number)

    # As a socket

    def send(self, message, arrays=()):
        self.inbox.put_nowait(message)

    async def receive(self):
        return await self.outbox.get()

    def close(self):
        self._work.cancel()

    def _die(self, code):
        self.returncode = code
        self._dead.set()
        self._work.cancel()

    def _say(self, message, arrays=()):
        self.outbox.put_nowait((message, arrays))

    async def _run(self):
        rng = self.world.rng
        left: dict[str, list[int]] = {}
        await self.inbox.get()
        self._say(Loaded(self.world.wire, 0.0, 0.0))
        while True:
            await asyncio.sleep(0)
            while not self.inbox.empty():
                message = self.inbox.get_nowait()
                if isinstance(message, Stop):
                    return self._die(0)
                if isinstance(message, Cancel):
                    left.pop(message.request_id, None)
                elif isinstance(message, Submit):
                    left[message.request_id] = [message.fields["seed"] + index for index in range(message.fields["n"])]
            if self.world.dies():
                return self._die(-9)
            if not left:
                continue
            chosen = rng.sample(sorted(left), min(len(left), rng.choice([1, 1, 2])))
            self.board.write(Unit("denoising", tuple(chosen), time.monotonic(), 60.0))
            if self.world.dies():
                self.world.blamed.update(chosen)
                return self._die(-11)
            for request_id in chosen:
                self._unit(request_id, left, rng)
            self.board.write(None)

    def _unit(self, request_id, left, rng):
        seeds = left[request_id]
        seed = rng.choice(seeds)
        index = self.world.seeds[request_id].index(seed)
        if rng.random() < 0.5:
            self._say(Progressed(request_id, index, "denoising", 1, 4, 1.0))
            return
        seeds.remove(seed)
        media = np.full(12, seed, dtype=np.uint8)
        self._say(OutputMade(request_id, index, [(2, 2, 3)], ["uint8"], seed, {}, {}, []), [media])
        if not seeds:
            del left[request_id]


class World:
    """What the workers of an example have in common: how many of them will die, and how soon."""

    def __init__(self, schema, rng, folder):
        self.schema, self.wire, self.rng, self.folder = schema, schema_to_wire(schema), rng, folder
        self.num_deaths, self.chance = 0, 0.0
        self.blamed: set[str] = set()
        self.seeds: dict[str, list[int]] = {}
        self.count = 0

    def dies(self):
        """Say whether a worker dies now."""
        dies = self.num_deaths > 0 and self.rng.random() < self.chance
        self.num_deaths -= dies
        return dies

    async def start_worker(self, folder, number, engine_settings):
        """Stand for `start_worker`."""
        self.count += 1
        board = UnitBoard(self.folder / f"{self.count}.unit")
        worker: Any = Worker(self, board)
        worker.send(Start(engine_settings))
        return WorkerGroup([Rank(worker, worker)], board)


async def drive(world, engine, num_requests):
    """Submit and cancel at any moment; return the tickets, and which of them were cancelled."""
    tickets, cancelled = {}, set()
    for index in range(num_requests):
        request_id, n = f"r{index}", world.rng.randint(1, 3)
        params = world.schema.params_cls.from_fields({"prompt": "a", "seed": 10 * index, "n": n})
        world.seeds[request_id] = [10 * index + output for output in range(n)]
        try:
            tickets[request_id] = engine.submit(GenerationRequest(request_id, params.resolve(world.schema)))
        except NotReadyError:
            assert engine.state == "failed"
        for _ in range(world.rng.randint(0, 8)):
            await asyncio.sleep(0)
        if tickets and world.rng.random() < 0.2:
            victim = world.rng.choice(sorted(tickets))
            if not tickets[victim].done:
                cancelled.add(victim)
            engine.cancel(victim)
    return tickets, cancelled


async def check(world, engine, tickets, cancelled):
    """Every ticket ends, with its own outputs or with what happened to it."""
    for request_id, ticket in tickets.items():
        try:
            outputs = await asyncio.wait_for(ticket.result(), SECONDS)
        except CancelledError:
            assert request_id in cancelled
        except WorkerLostError:
            assert request_id in world.blamed or engine.state == "failed"
        else:
            assert request_id not in cancelled | world.blamed
            assert [output.seed for output in outputs] == world.seeds[request_id]
            assert all((output.media[0] == output.seed).all() for output in outputs)


@pytest.mark.parametrize("replicas", [0, 1, pytest.param(3, marks=pytest.mark.slow)])
def test_every_request_has_one_answer_through_deaths(fault_family, fault_pipeline, monkeypatch, replicas):
    schema, seen = fault_pipeline().schema, Counter[str]()

    @settings(max_examples=300, deadline=None, derandomize=True)
    @given(
        seed=st.integers(0, 2**32),
        num_deaths=st.integers(0, 1 + MAX_DEATHS * max(1, replicas)),
        chance=st.sampled_from([0.02, 0.1, 0.3]),
        num_requests=st.integers(1, 12),
    )
    def any_deaths(seed, num_deaths, chance, num_requests):
        async def example(folder):
            world = World(schema, random.Random(seed), Path(folder))
            monkeypatch.setattr(supervisor_module, "start_worker", world.start_worker)
            args = EngineSettings(max_waiting=100)
            engine = ReplicaSet(args, replicas) if replicas else Supervisor(args)
            await engine.start()
            world.num_deaths, world.chance = num_deaths, chance
            try:
                await check(world, engine, *await drive(world, engine, num_requests))
            finally:
                await engine.close()
            seen.update({"deaths": world.count - max(1, replicas), "gave up": engine.gave_up.is_set()})

        with tempfile.TemporaryDirectory() as folder:
            asyncio.run(example(folder))

    any_deaths()
    assert seen["deaths"] > 20 and seen["gave up"], "what is to be survived happened"
