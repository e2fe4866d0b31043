"""Several workers behind one client: where requests go, and what becomes of them when a worker is lost."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections import deque
from pathlib import Path

import numpy as np
import pytest
import torch

from safelight.core.server_args import ServerArgs
from safelight.errors import (
    CancelledError,
    InvalidParameterError,
    ModelError,
    NotReadyError,
    QueueFullError,
    WorkerLostError,
)
from safelight.preparation import prepare
from safelight.runtime.client import GenerationRequest
from safelight.runtime.messages import Progressed, Start
from safelight.runtime.settings import EngineSettings
from safelight.runtime.supervisor.replicas import ReplicaSet
from safelight.runtime.worker.gpu_worker import local_args
from tests.live_server import fault_model, generate, serving
from tests.runtime.workers import answer, ask, drive
from tests.serving.stub_engine import IMAGE_SCHEMA


def settings_of(folder, **settings):
    return EngineSettings(**{"server_args": ServerArgs(str(folder), device="cpu"), "warm_up": False, **settings})


@contextlib.asynccontextmanager
async def replicas_of(folder, num_replicas=2, **settings):
    replicas = ReplicaSet(settings_of(folder, **settings), num_replicas)
    await asyncio.wait_for(replicas.start(), 90)
    folders = [replica._folder for replica in replicas.replicas]
    try:
        yield replicas
    finally:
        await replicas.close()
        assert not [folder for folder in folders if folder.exists()], "no socket or file is left over"


def unstarted(num_replicas=3, **settings):
    """Return replicas that call themselves ready, and have no workers."""
    replicas = ReplicaSet(EngineSettings(**settings), num_replicas)
    replicas._phase = "ready"
    for replica in replicas.replicas:
        replica.schema, replica.state = IMAGE_SCHEMA, "ready"
    return replicas


def put(replicas, request_id, steps, **fields):
    """Submit a request of a cost in proportion to its steps."""
    return ask(replicas, request_id=request_id, num_inference_steps=steps, **fields)


def held(replicas):
    """Return what each replica has."""
    return [sorted(replica._live) for replica in replicas.replicas]


async def first_step(*tickets):
    while not all(ticket.progress.step for ticket in tickets):
        await asyncio.sleep(0.01)


# Routing


def test_a_request_goes_where_the_least_cost_is_left():
    async def test():
        replicas = unstarted()
        for name, steps in (("a", 40), ("b", 10), ("c", 20), ("d", 5), ("e", 6), ("f", 10)):
            put(replicas, name, steps)
        assert held(replicas) == [["a"], ["b", "d", "e"], ["c", "f"]]

    drive(test())


@pytest.mark.parametrize(
    "larger", [{"num_inference_steps": 9}, {"width": 192}, {"n": 2}, {"true_cfg_scale": 4.0, "negative_prompt": "no"}]
)
def test_cost_is_steps_tokens_branches_and_outputs(larger):
    async def test():
        replicas = unstarted(2)
        ask(replicas, request_id="large", **larger)
        put(replicas, "b", 4)
        put(replicas, "c", 3)
        assert held(replicas) == [["large"], ["b", "c"]]

    drive(test())


def test_what_is_done_does_not_count():
    async def test():
        replicas = unstarted(2)
        ticket = put(replicas, "long", 40)
        put(replicas, "short", 20)
        put(replicas, "next", 1)
        assert held(replicas) == [["long"], ["next", "short"]]
        replicas.replicas[0]._take_progress(Progressed("long", 0, "denoising", 30, 40, 1.0), ())
        assert ticket.progress.step == 30
        put(replicas, "later", 1)
        assert held(replicas) == [["later", "long"], ["next", "short"]]
        replicas.cancel("short")
        put(replicas, "last", 1)
        assert held(replicas) == [["later", "long"], ["last", "next"]]

    drive(test())


def test_only_replicas_that_are_ready_are_given_requests_while_there_are_any():
    async def test():
        replicas = unstarted()
        first, second, third = replicas.replicas
        first.state, second.state = "restarting", "failed"
        put(replicas, "a", 10)
        put(replicas, "b", 1)
        assert held(replicas) == [[], [], ["a", "b"]] and replicas.state == "ready"
        third.state = "failed"
        put(replicas, "c", 1)
        assert held(replicas)[0] == ["c"] and replicas.state == "restarting"
        first.state = "failed"
        assert replicas.state == "failed"
        with pytest.raises(NotReadyError, match="failed"):
            put(replicas, "d", 1)

    drive(test())


def test_the_queue_is_bounded_as_a_whole(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    async def test():
        replicas = unstarted(2, max_waiting=3)
        tickets = [put(replicas, name, 1) for name in "abc"]
        with pytest.raises(QueueFullError, match="3 requests wait"):
            put(replicas, "d", 1)
        assert replicas.stats.num_waiting == 3
        replicas.cancel("b")
        with pytest.raises(CancelledError):
            await answer(tickets[1])
        put(replicas, "e", 1)
        replicas.drain()
        assert replicas.state == "draining"
        with pytest.raises(NotReadyError, match="draining"):
            put(replicas, "f", 1)
        await replicas.close()
        for ticket in (tickets[0], tickets[2]):
            with pytest.raises(NotReadyError, match="stopped"):
                await answer(ticket)

    drive(test())


# With workers


def test_the_queue_of_a_worker_is_bounded(fault_family, fault_folder):
    async def test():
        folder = fault_folder(step_seconds=0.01, name="served")
        async with replicas_of(folder, 1, max_waiting=3, max_running=1) as replicas:
            tickets, refused = [], 0
            for index in range(40):
                try:
                    tickets.append(ask(replicas, request_id=f"r{index}"))
                except QueueFullError as error:
                    refused += 1
                    assert error.status == 429
            assert 3 <= len(tickets) < 40 and len(tickets) + refused == 40
            for ticket in tickets:
                assert len(await answer(ticket)) == 1

    drive(test())


@pytest.mark.slow
def test_replicas_give_the_bytes_of_one(fault_family, fault_folder, expected):
    async def test():
        async with replicas_of(fault_folder(name="served", step_seconds=0.01), max_running=2) as replicas:
            seen: list[int] = []
            told: list[str] = []
            replicas.on_step = lambda seconds, rows: seen.append(rows)
            assert replicas.state == "ready" and replicas.stats.load_seconds > 0
            tickets = [put(replicas, f"r{index}", 2 + index, seed=index, n=1 + index % 2) for index in range(6)]
            assert all(len(live) > 1 for live in held(replicas))
            for index, ticket in enumerate(tickets):
                for output in await answer(ticket):
                    alone = expected(seed=output.seed, num_inference_steps=2 + index)
                    assert np.array_equal(output.media[0], alone)
            assert len(seen) == sum((2 + index) * (1 + index % 2) for index in range(6))
            replicas.on_compiled = told.append
            for replica in replicas.replicas:
                replica.on_compiled("reason")
            assert told == ["reason"] * 2

    drive(test())


def test_a_killed_replica_gives_its_requests_to_the_other_and_comes_back(fault_family, fault_folder, expected):
    async def test():
        folder = fault_folder(name="served", step_seconds=0.05)
        async with replicas_of(folder, max_running=2) as replicas:
            lost, other = replicas.replicas
            pid, other_pid = (replica._worker.process.pid for replica in replicas.replicas)
            tickets = [put(replicas, f"r{index}", 20, seed=index) for index in range(6)]
            theirs = [tickets[int(name[1:])] for name in lost._live]
            assert len(theirs) == 3
            await first_step(theirs[0])
            os.kill(pid, signal.SIGKILL)
            while lost.state == "ready" or lost._live:
                await asyncio.sleep(0.001)
            blamed = [ticket for ticket in theirs if ticket.done]
            assert len(blamed) == 1 and replicas.state == "ready"
            assert len(other._live) == 5
            late = put(replicas, "late", 2)
            assert "late" in other._live
            replicas.cancel("late")
            with pytest.raises(CancelledError):
                await answer(late)
            for index, ticket in enumerate(tickets):
                if ticket in blamed:
                    with pytest.raises(WorkerLostError):
                        await answer(ticket)
                    continue
                made = (await answer(ticket))[0].media[0]
                assert np.array_equal(made, expected(num_inference_steps=20, seed=index))
            assert other._worker.process.pid == other_pid and other.stats.num_restarts == 0
            while lost.state != "ready":
                await asyncio.sleep(0.01)
            assert lost._worker.process.pid != pid and replicas.stats.num_restarts == 1
            again = put(replicas, "again", 4)
            assert "again" in lost._live
            assert np.array_equal((await answer(again))[0].media[0], expected())
            assert replicas.stats.num_running == replicas.stats.num_waiting == 0

    drive(test())


@pytest.mark.slow
def test_a_replica_that_gave_up_is_left_out_and_the_last_one_ends_all(
    fault_family, fault_folder, expected, monkeypatch
):
    monkeypatch.setattr("safelight.runtime.supervisor.supervisor.MAX_DEATHS", 1)

    async def test():
        async with replicas_of(fault_folder(name="served", step_seconds=0.02), max_running=1) as replicas:
            first, second = replicas.replicas
            for replica in replicas.replicas:
                replica._deaths = deque(maxlen=1)
            bad = put(replicas, "bad", 50, prompt="[exit@denoising:3] a cat")
            beside = put(replicas, "beside", 50)
            behind = put(replicas, "behind", 60)
            assert held(replicas) == [["bad", "behind"], ["beside"]]
            with pytest.raises(WorkerLostError, match="worked on this request"):
                await answer(bad)
            assert first.state == "failed" and replicas.state == "ready" and not replicas.gave_up.is_set()
            assert np.array_equal((await answer(beside))[0].media[0], expected(num_inference_steps=50))
            assert np.array_equal((await answer(behind))[0].media[0], expected(num_inference_steps=60))
            last, waits = put(replicas, "last", 50, prompt="[exit@denoising:3] a cat"), put(replicas, "waits", 500)
            for ticket in (last, waits):
                with pytest.raises(WorkerLostError):
                    await answer(ticket)
            await asyncio.wait_for(replicas.gave_up.wait(), 5)
            assert second.state == replicas.state == "failed"

    drive(test())


def test_one_that_cannot_be_loaded_is_said_at_once_and_ends_all(tmp_path):
    async def test():
        replicas = ReplicaSet(settings_of(tmp_path), 2)
        with pytest.raises(ModelError, match=r"model_index\.json"):
            await asyncio.wait_for(replicas.start(), 90)
        assert not [replica._folder for replica in replicas.replicas if replica._folder.exists()]
        with pytest.raises(NotReadyError):
            replicas.submit(GenerationRequest("r", prepare(IMAGE_SCHEMA, {"prompt": "a cat"})[0]))

    drive(test())


# Devices


def start_of(device, **fields):
    ranks = {"cfg_parallel_size": fields.pop("num_ranks", 1)}
    settings = EngineSettings(ServerArgs("m", device=device, **ranks), first_device=fields.pop("first_device", 0))
    return Start(settings, store="0.store", **fields)


def test_each_replica_has_devices_of_its_own(monkeypatch):
    settings = EngineSettings(server_args=ServerArgs("m", cfg_parallel_size=2))
    assert [replica.settings.first_device for replica in ReplicaSet(settings, 3).replicas] == [0, 2, 4]
    monkeypatch.setattr(ServerArgs, "torch_device", lambda self: torch.device(self.device.replace("auto", "cuda")))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    assert local_args(start_of("auto")).device == "auto"
    assert local_args(start_of("auto", first_device=1)).device == "cuda:1"
    assert local_args(start_of("cuda:1", first_device=2)).device == "cuda:3"
    assert local_args(start_of("auto", first_device=2, rank=1, local_rank=1, num_ranks=2)).device == "cuda:3"
    with pytest.raises(InvalidParameterError, match=r"(?s)device.*4.*number 4"):
        local_args(start_of("auto", first_device=4))
    assert local_args(start_of("cpu", first_device=3)).device == "cpu"


# A server


@pytest.mark.slow
def test_a_server_with_two_replicas_outlives_one_of_its_workers(tmp_path):
    model = fault_model(tmp_path / "model", step_seconds=0.05)
    with serving(tmp_path, model, "--replicas", "2", "--max-running", "1") as server, server.http() as http:
        first, second = server.children()
        assert generate(http).status_code == 200
        assert num_listening(server.process.pid, first, second) == 1
        os.kill(first, signal.SIGKILL)
        made = [generate(http) for _ in range(3)]
        assert [answer.status_code for answer in made] == [200] * 3, "no request waits for the lost one"
        assert len({answer.json()["data"][0]["b64_json"] for answer in made}) == 1
        assert http.get("/readyz").status_code == 200
        assert second in server.children()


LISTENS = "0A"
"""How `/proc/net/tcp` says it."""


def num_listening(*processes):
    """Return how many TCP sockets processes listen on."""
    inodes = set()
    for process in processes:
        for descriptor in Path(f"/proc/{process}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                inodes.add(str(descriptor.readlink()))
    rows = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    return sum(row[3] == LISTENS and f"socket:[{row[9]}]" in inodes for row in rows)
