"""Several ranks behind one supervisor: they make the bytes of one, and fail as one group or not at all."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from contextlib import nullcontext

import numpy as np
import pytest
import torch

from safelight.core.server_args import ServerArgs
from safelight.errors import InvalidParameterError, OutOfMemoryError, RankFailedError, SafelightError, WorkerLostError
from safelight.parallel.calls import CallsOverRanks
from safelight.parallel.collectives import DesynchronisedError
from safelight.parallel.mesh import lone_mesh
from safelight.runtime.settings import EngineSettings
from safelight.runtime.supervisor import group
from safelight.runtime.worker.engine import Engine
from safelight.runtime.worker.ranks import Ranks, reason_of, vote_of
from tests.calls import loaded_as
from tests.runtime.conftest import request
from tests.runtime.workers import answer, ask, drive, pid_of, running


def on_two(folder, **settings):
    return running(folder, server_args=ServerArgs(str(folder), device="cpu", cfg_parallel_size=2), **settings)


async def in_mid_step(supervisor):
    """Return when a denoising step has run for a while: between two units, no request's work is lost."""
    while True:
        unit = supervisor._worker.board.read()
        if unit is not None and unit.kind == "denoising" and 0.1 < time.monotonic() - unit.started < 0.25:
            return
        await asyncio.sleep(0.01)


def test_two_ranks_give_the_bytes_of_one(fault_family, fault_folder, expected):
    async def test():
        async with on_two(fault_folder(name="served")) as supervisor:
            asked = [("a cat", 1.0, 4), ("a dog", 3.0, 6), ("an owl", 2.0, 2)]
            tickets = [
                ask(supervisor, prompt, f"r{index}", guidance_scale=scale, num_inference_steps=steps)
                for index, (prompt, scale, steps) in enumerate(asked)
            ]
            for ticket, (prompt, scale, steps) in zip(tickets, asked, strict=True):
                made = (await answer(ticket))[0].media[0]
                assert np.array_equal(made, expected(prompt=prompt, guidance_scale=scale, num_inference_steps=steps))
            cancelled = ask(supervisor, "[sleep@denoising:1=0.5] a cat", "gone", num_inference_steps=100)
            await asyncio.sleep(0.3)
            supervisor.cancel("gone")
            assert cancelled.done
            assert np.array_equal((await answer(ask(supervisor)))[0].media[0], expected())

    drive(test())


@pytest.mark.parametrize(
    ("directive", "error"),
    [
        pytest.param("raise@encoding", RankFailedError, marks=pytest.mark.slow),
        pytest.param("oom@denoising:1", OutOfMemoryError, marks=pytest.mark.slow),
        ("full@denoising:1", OutOfMemoryError),
        pytest.param("oom@encoding", OutOfMemoryError, marks=pytest.mark.slow),
        pytest.param("raise@denoising:2", RankFailedError, marks=pytest.mark.slow),
        pytest.param("raise@decoding", RankFailedError, marks=pytest.mark.slow),
    ],
)
def test_what_fails_outside_a_shared_forward_on_one_rank_ends_that_request_alone(
    fault_family, fault_folder, expected, directive, error
):
    """Rank 1 alone fails; all vote, and go on together."""

    async def test():
        async with on_two(fault_folder(name="served")) as supervisor:
            pid = await pid_of(supervisor)
            bad = ask(supervisor, f"[rank1_{directive}] a cat", "bad")
            good = [ask(supervisor, request_id=f"good{index}") for index in range(2)]
            with pytest.raises(error):
                await answer(bad)
            for ticket in good:
                assert np.array_equal((await answer(ticket))[0].media[0], expected())
            assert await pid_of(supervisor) == pid

    drive(test())


@pytest.mark.parametrize(
    "directive",
    [
        "raise@forward:1",
        pytest.param("exit@denoising:1", marks=pytest.mark.slow),
        pytest.param("oom@forward:2", marks=pytest.mark.slow),
        pytest.param("stop@denoising:1", marks=pytest.mark.slow),
    ],
)
def test_a_rank_lost_where_others_wait_for_it_takes_the_group_down(
    fault_family, fault_folder, expected, caplog, directive
):
    """The request whose unit ran is answered; the group restarts, and the others run again.

    What ends the group is the rank's death or its silence: the limit of a unit, a minute and more, is never waited for.
    """

    async def test():
        async with on_two(fault_folder(name="served"), max_running=1) as supervisor:
            pid = await pid_of(supervisor)
            bad = ask(supervisor, f"[rank1_{directive}] a cat", "bad")
            good = [ask(supervisor, request_id=f"good{index}") for index in range(2)]
            with pytest.raises(WorkerLostError):
                await answer(bad)
            assert "the worker died" in caplog.text or "has been silent" in caplog.text
            assert "takes more than" not in caplog.text
            for ticket in good:
                assert np.array_equal((await answer(ticket))[0].media[0], expected())
            assert await pid_of(supervisor) != pid
            assert len(supervisor._worker.ranks) == 2

    drive(test())


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.slow)])
def test_a_rank_killed_in_mid_denoise(fault_family, fault_folder, expected, number):
    async def test():
        async with on_two(fault_folder(name="served", step_seconds=0.4)) as supervisor:
            await pid_of(supervisor)
            first, second = (rank.process for rank in supervisor._worker.ranks)
            tickets = [ask(supervisor, request_id=f"r{index}", num_inference_steps=4) for index in range(3)]
            await in_mid_step(supervisor)
            os.kill(second.pid, number)
            begun, lost = time.monotonic(), 0
            for ticket in tickets:
                try:
                    made = (await answer(ticket))[0].media[0]
                    assert np.array_equal(made, expected(num_inference_steps=4))
                except WorkerLostError:
                    lost += 1
                    assert time.monotonic() - begun < 5
            assert lost == 1
            assert first.returncode is not None and second.returncode is not None

    drive(test())


@pytest.mark.parametrize(
    ("settings", "field", "numbers"),
    [
        ({"cfg_parallel_size": 3}, "cfg_parallel_size", "at most 2"),
        pytest.param({"tp_size": 2}, "tp_size", "no tensor-parallel plan", marks=pytest.mark.slow),
        pytest.param({"ring_degree": 2}, "ring_degree", "no sequence-parallel plan", marks=pytest.mark.slow),
        pytest.param({"devices": 4}, "devices", "1 or 2", marks=pytest.mark.slow),
        pytest.param(
            {"cfg_parallel_size": 2, "compile": "blocks"}, "compile", "none with 2 devices", marks=pytest.mark.slow
        ),
        pytest.param(
            {"cfg_parallel_size": 2, "vae_parallel": True}, "vae_parallel", "cannot be divided", marks=pytest.mark.slow
        ),
    ],
)
def test_what_a_model_cannot_have_is_refused_at_start(fault_family, fault_folder, settings, field, numbers):
    folder = fault_folder(name="served")

    async def test():
        args = ServerArgs(str(folder), device="cpu", **settings)
        with pytest.raises(SafelightError, match=f"(?s){field}.*{numbers}"):
            async with running(folder, server_args=args):
                pass

    drive(test())


@pytest.mark.parametrize("settings", [{"tp_size": 0}, {"devices": 3, "tp_size": 2}, {"ulysses_degree": True}])
def test_sizes_that_do_not_fit_are_refused(settings):
    with pytest.raises(InvalidParameterError):
        ServerArgs(**settings)


class TwoRanks(Ranks):
    """As one rank of two sees it while the other does the same."""

    size = 2

    def agree(self, errors):
        return list(errors)


@pytest.mark.parametrize(("directive", "shared"), [("raise@encoding", False), ("raise@forward:1", True)])
def test_what_fails_in_a_call_that_ranks_share_ends_the_group(fault_pipeline, directive, shared):
    """The other ranks wait in it; in what a stage does beside its calls they do not."""
    lone = lone_mesh()
    over_ranks = CallsOverRanks({}, lone.cfg, lone.world, torch.device("cpu"))
    pipeline = loaded_as(fault_pipeline(), over_ranks=over_ranks)
    engine = Engine(pipeline, ranks=TwoRanks())
    task = engine.add(request(pipeline, f"[{directive}] a cat"))
    with pytest.raises(DesynchronisedError) if shared else nullcontext():
        while not task.done:
            engine.tick()
    assert isinstance(task.error, RuntimeError) is not shared


@pytest.mark.parametrize("error", [OSError("no more processes"), asyncio.CancelledError()])
def test_a_start_that_ends_in_the_middle_leaves_nothing(fault_folder, tmp_path, monkeypatch, error):
    """One rank was started already."""
    started: list[group.Rank] = []
    whole = group.start_rank

    async def start_rank(*details):
        if started:
            raise error
        started.append(await whole(*details))
        return started[0]

    async def test():
        folder = tmp_path / "sockets"
        folder.mkdir()
        args = ServerArgs(str(fault_folder(name="served")), device="cpu", cfg_parallel_size=2)
        with pytest.raises(type(error)):
            await group.start_worker(folder, 0, EngineSettings(args))
        assert started[0].process.returncode == -signal.SIGKILL
        assert list(folder.iterdir()) == []

    monkeypatch.setattr(group, "start_rank", start_rank)
    drive(test())


def test_votes():
    assert [vote_of(error) for error in (None, ValueError(), torch.OutOfMemoryError(), MemoryError())] == [0, 1, 2, 2]
    shared = RankFailedError("here")
    shared.__cause__ = MemoryError()
    assert vote_of(shared) == 2 and isinstance(reason_of(shared), MemoryError)
    errors = [None, ValueError("own")]
    assert Ranks().agree(errors) == errors and Ranks().leads
