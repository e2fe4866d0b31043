"""A worker process, driven over its socket: it answers, it dies, it hangs, and every request has one answer."""

from __future__ import annotations

import asyncio
import os
import signal
import stat
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from safelight.errors import (
    CancelledError,
    InvalidParameterError,
    ModelError,
    NonFiniteOutputError,
    OutOfMemoryError,
    SafelightError,
    WorkerLostError,
)
from safelight.runtime.messages import OutputMade, Progressed
from safelight.runtime.settings import EngineSettings
from safelight.runtime.supervisor.group import WorkerGroup
from safelight.runtime.supervisor.supervisor import Supervisor
from safelight.runtime.unit_board import UnitBoard, UnitLimits
from tests.runtime.workers import answer, ask, drive, pid_of, running


def test_outputs_progress_and_images_cross_the_socket(fault_family, fault_folder, expected):
    async def test():
        from PIL import Image

        async with running(fault_folder(step_seconds=0.01, name="served")) as supervisor:
            mode = stat.S_IMODE(supervisor._folder.stat().st_mode)
            assert mode == 0o700
            image = Image.new("RGB", (9, 5), (10, 200, 30))
            ticket = ask(supervisor, "an owl", n=2, image=[image, image], num_inference_steps=3)
            seen = [progress async for progress in ticket.changes()]
            outputs = await answer(ticket)
            assert [output.seed for output in outputs] == [0, 1]
            for output in outputs:
                alone = expected(prompt="an owl", seed=output.seed, image=(image, image), num_inference_steps=3)
                assert np.array_equal(output.media[0], alone)
                assert output.params["num_inference_steps"] == 3 and output.params["image"] == ["9x5", "9x5"]
                assert {"encoding", "denoising", "decoding"} <= output.timings.keys()
            running_ones = [progress for progress in seen if progress.state == "running"]
            assert {progress.num_inference_steps for progress in running_ones} >= {6}
            steps = [progress.step for progress in running_ones]
            assert steps == sorted(steps) and len(set(steps)) >= 4
            assert supervisor.stats.num_running == supervisor.stats.num_waiting == 0

    drive(test())


@pytest.mark.parametrize(
    ("directive", "error"),
    [
        ("raise@encoding", SafelightError),
        ("oom@denoising:1", OutOfMemoryError),
        ("nan@denoising:2", NonFiniteOutputError),
        ("refuse@decoding", InvalidParameterError),
    ],
)
def test_a_failure_is_answered_by_name_and_hurts_nobody(fault_family, fault_folder, expected, directive, error):
    async def test():
        async with running(fault_folder(step_seconds=0.01, name="served")) as supervisor:
            pid = await pid_of(supervisor)
            bad, good = ask(supervisor, f"[{directive}] a cat", n=2), ask(supervisor, request_id="r1")
            with pytest.raises(error) as caught:
                await answer(bad)
            assert type(caught.value) is error
            assert caught.value.param == ("prompt" if error is InvalidParameterError else None)
            for internal in ("/", "0x", "GiB", "Error"):
                assert internal not in str(caught.value)
            assert np.array_equal((await answer(good))[0].media[0], expected())
            assert await pid_of(supervisor) == pid

    drive(test())


def test_cancel_stops_work_and_answers_at_once(fault_family, fault_folder):
    async def test():
        async with running(fault_folder(step_seconds=0.05, name="served"), max_running=1) as supervisor:
            long, queued = (ask(supervisor, request_id=f"r{index}", num_inference_steps=1000) for index in range(2))
            while long.progress.step < 2:
                await asyncio.sleep(0.01)
            for ticket in (queued, long):
                supervisor.cancel(ticket.request.request_id)
                assert ticket.done
                with pytest.raises(CancelledError):
                    await answer(ticket)
            begun = time.monotonic()
            await answer(ask(supervisor, request_id="r2", num_inference_steps=1))
            assert time.monotonic() - begun < 5, "the long one would have taken 50 s"
            assert supervisor.stats.num_running == 0
            steps = []
            supervisor.on_step = lambda seconds, rows: steps.append(seconds)
            await asyncio.sleep(0.5)
            assert steps == [], "the worker goes on with what was cancelled"

    drive(test())


@pytest.mark.parametrize(
    "directive",
    ["exit@encoding", *(pytest.param(each, marks=pytest.mark.slow) for each in ("segv@decoding", "exit@denoising:1"))],
)
def test_a_death_is_answered_and_the_others_run_again(fault_family, fault_folder, expected, directive):
    async def test():
        async with running(fault_folder(step_seconds=0.01, name="served"), max_running=2) as supervisor:
            pid = await pid_of(supervisor)
            others = [ask(supervisor, request_id=f"r{index}", num_inference_steps=50, seed=index) for index in range(3)]
            while others[0].progress.step < 1 and others[1].progress.step < 1:
                await asyncio.sleep(0.005)
            bad = ask(supervisor, f"[{directive}] a cat", "bad", num_inference_steps=2)
            with pytest.raises(WorkerLostError):
                await answer(bad)
            assert supervisor.state == "restarting"
            for index, ticket in enumerate(others):
                output = (await answer(ticket))[0]
                assert np.array_equal(output.media[0], expected(num_inference_steps=50, seed=index))
            assert await pid_of(supervisor) != pid
            assert supervisor.stats.num_restarts == 1

    drive(test())


def test_a_kill_in_the_middle_is_noticed_at_once(fault_family, fault_folder, expected):
    async def test():
        async with running(fault_folder(step_seconds=0.2, name="served")) as supervisor:
            pid = await pid_of(supervisor)
            ticket = ask(supervisor, num_inference_steps=100)
            while ticket.progress.step < 1:
                await asyncio.sleep(0.005)
            os.kill(pid, signal.SIGKILL)
            begun = time.monotonic()
            with pytest.raises(WorkerLostError):
                await answer(ticket)
            assert time.monotonic() - begun < 1.0
            assert supervisor.state == "restarting"
            assert np.array_equal((await answer(ask(supervisor, request_id="r1")))[0].media[0], expected())

    drive(test())


def test_three_deaths_are_enough(fault_family, fault_folder):
    async def test():
        async with running(fault_folder(name="served")) as supervisor:
            for index in range(3):
                await pid_of(supervisor)
                with pytest.raises(WorkerLostError):
                    await answer(ask(supervisor, "[exit@encoding] a cat", f"r{index}"))
            await asyncio.wait_for(supervisor.gave_up.wait(), 5)
            assert supervisor.state == "failed"
            with pytest.raises(SafelightError):
                ask(supervisor, request_id="r9")

    drive(test())


@pytest.mark.parametrize(
    "directive",
    [
        "spin@denoising:1",
        *(pytest.param(each, marks=pytest.mark.slow) for each in ("stop@denoising:1", "sleep@denoising:1=600")),
    ],
)
def test_a_hung_worker_is_killed(fault_family, fault_folder, expected, directive):
    async def test():
        limits = UnitLimits(least=1.0, first=60.0)
        async with running(fault_folder(name="served"), unit_limits=limits, heartbeat_limit=2.0) as supervisor:
            for index in range(2):  # kinds are known from here on
                await answer(ask(supervisor, "warm", f"w{index}"))
            pid = await pid_of(supervisor)
            bad, good = ask(supervisor, f"[{directive}] a cat"), ask(supervisor, request_id="r1")
            with pytest.raises(WorkerLostError):
                await answer(bad)
            assert np.array_equal((await answer(good))[0].media[0], expected())
            assert await pid_of(supervisor) != pid
            with pytest.raises(ProcessLookupError):
                os.kill(pid, 0)

    drive(test())


def test_a_busy_worker_is_left_alone(fault_family, fault_folder):
    """A unit far longer than the heartbeat's limit is no hang: the heartbeat goes on beside it."""

    async def test():
        async with running(fault_folder(name="served"), heartbeat_limit=1.0) as supervisor:
            pid = await pid_of(supervisor)
            for directive in ("sleep@denoising:1=3", "spin@denoising:1=3"):
                await answer(ask(supervisor, f"[{directive}] a cat", directive))
            assert await pid_of(supervisor) == pid

    drive(test())


def test_a_server_that_was_held_up_does_not_blame_its_worker(tmp_path):
    """Many requests at once can keep its loop from what the worker says."""

    async def test():
        rank: Any = SimpleNamespace(heard=time.monotonic(), has_begun=True)
        worker = WorkerGroup([rank], UnitBoard(tmp_path / "unit"), ready=True)
        watching = asyncio.create_task(worker.watch(EngineSettings(heartbeat_limit=0.6)))
        await asyncio.sleep(0.15)
        time.sleep(1.5)  # the loop itself stands still
        await asyncio.sleep(0.15)
        assert not watching.done()
        await asyncio.wait_for(watching, 5)

    drive(test())


@pytest.mark.parametrize("kind", [pytest.param(OutputMade, marks=pytest.mark.slow), Progressed])
def test_a_message_that_cannot_be_understood_ends_its_request_alone(fault_family, fault_folder, expected, kind):
    async def test():
        async with running(fault_folder(name="served")) as supervisor:
            name = "_take_output" if kind is OutputMade else "_take_progress"
            pid, take = await pid_of(supervisor), getattr(supervisor, name)

            def confused(message, frames):
                if message.request_id == "bad":
                    raise ValueError("cannot reshape")
                take(message, frames)

            setattr(supervisor, name, confused)
            bad, good = ask(supervisor, request_id="bad"), ask(supervisor, request_id="good")
            with pytest.raises(SafelightError, match="cannot be understood"):
                await answer(bad)
            assert np.array_equal((await answer(good))[0].media[0], expected())
            assert await pid_of(supervisor) == pid

    drive(test())


def test_a_worker_that_sends_nonsense_is_replaced(fault_family, fault_folder, expected):
    async def test():
        async with running(fault_folder(name="served")) as supervisor:
            pid, take = await pid_of(supervisor), supervisor._take_heartbeat
            nonsense = [ValueError("not a heartbeat")]

            def confused(message):
                if nonsense:
                    raise nonsense.pop()
                take(message)

            supervisor._take_heartbeat = confused
            while nonsense or await pid_of(supervisor) == pid:
                await asyncio.sleep(0.01)
            assert np.array_equal((await answer(ask(supervisor)))[0].media[0], expected())

    drive(test())


def test_closing_what_was_not_started_removes_nothing(tmp_path, monkeypatch):
    (tmp_path / "kept").touch()
    monkeypatch.chdir(tmp_path)
    drive(Supervisor(EngineSettings()).close())
    assert (tmp_path / "kept").exists()


def test_a_worker_without_its_supervisor_ends(fault_family, fault_folder):
    async def test():
        async with running(fault_folder(name="served")) as supervisor:
            pid = await pid_of(supervisor)
            environ = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            assert environ[-2] == str(os.getpid()).encode()

    drive(test())


@pytest.mark.parametrize(
    ("index", "error"),
    [pytest.param(None, ModelError, marks=pytest.mark.slow), ('{"_class_name": "os.system"}', ModelError)],
)
def test_a_model_that_cannot_be_loaded_is_said_at_once(tmp_path, index, error):
    if index is not None:
        (tmp_path / "model_index.json").write_text(index)

    async def test():
        with pytest.raises(error) as caught:
            async with running(tmp_path):
                pass
        assert "model_index.json" in str(caught.value)

    drive(test())
