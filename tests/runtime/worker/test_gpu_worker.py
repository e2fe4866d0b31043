"""What a worker does with its device: it makes it the current one, and ends with it."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
import torch

from safelight.core.server_args import ServerArgs
from safelight.errors import ModelError, WorkerLostError
from safelight.runtime.messages import Start
from safelight.runtime.settings import EngineSettings
from safelight.runtime.worker import gpu_worker
from tests.runtime.workers import answer, ask, drive, pid_of, running


def test_a_worker_ends_with_its_device_and_the_next_one_goes_on(fault_family, fault_folder, expected):
    async def test():
        async with running(fault_folder(step_seconds=0.01, name="served")) as supervisor:
            pid = await pid_of(supervisor)
            bad, good = ask(supervisor, "[lost@denoising:2] a cat"), ask(supervisor, "an owl", request_id="r1")
            with pytest.raises(WorkerLostError):
                await answer(bad)
            assert np.array_equal((await answer(good))[0].media[0], expected(prompt="an owl"))
            assert await pid_of(supervisor) != pid

    drive(asyncio.wait_for(test(), 100))


@pytest.mark.parametrize(("device", "expected"), [("cuda", 0), ("cuda:3", 3)])
def test_a_worker_works_on_its_own_device(fault_family, fault_folder, monkeypatch, tmp_path, device, expected):
    """Libraries ask for the current device: streams, kernels' launchers, and checks at loading."""
    current = []
    monkeypatch.setattr(ServerArgs, "torch_device", lambda self: torch.device(self.device))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: current.append(device.index))

    def load(args, mesh):
        assert current == [expected], "before anything is loaded"
        raise ModelError("far enough")

    monkeypatch.setattr(gpu_worker, "load_pipeline", load)
    start = Start(EngineSettings(ServerArgs(str(fault_folder(name="served")), device=device), warm_up=False))
    with pytest.raises(ModelError, match="far enough"):
        gpu_worker.build_engine(start, tmp_path, None)
