"""Workers that die or hang: one request is answered, the others run again, and another worker goes on."""

from __future__ import annotations

import concurrent.futures
import os
import shutil
import signal
import time

import pytest

from tests.live_server import fault_model, generate, serving
from tests.reliability.conftest import CONTROL, Healthy, assert_error, until


@pytest.mark.parametrize("directive", [pytest.param("exit@denoising:1", marks=pytest.mark.slow), "segv@decoding"])
def test_a_dead_worker_costs_one_answer(mortal, directive):
    """The others wait for the next worker, and have the bytes that they have alone."""
    healthy = Healthy(mortal)
    with mortal.http(90) as http, concurrent.futures.ThreadPoolExecutor(3) as pool:
        expected = [generate(http, CONTROL, seed=seed, num_inference_steps=30) for seed in (1, 2)]
        others = [pool.submit(generate, http, CONTROL, seed=seed, num_inference_steps=30) for seed in (1, 2)]
        time.sleep(0.1)
        assert_error(generate(http, f"[{directive}] a cat"), 503, "worker_lost")
        unready = http.get("/readyz")
        assert unready.status_code == 503 and http.get("/livez").status_code == 200
        for other, alone in zip(others, expected, strict=True):
            assert other.result().json()["data"] == alone.json()["data"]
    healthy()


@pytest.mark.slow
@pytest.mark.parametrize("directive", ["stop@denoising:1", "spin@denoising:1"])
def test_a_hung_worker_is_killed(mortal, directive):
    healthy = Healthy(mortal)
    with mortal.http(90) as http:
        worker = mortal.worker()
        assert_error(generate(http, f"[{directive}] a cat"), 503, "worker_lost")
        until(lambda: mortal.children() not in ([], [worker]))
    healthy()


def test_a_stopped_worker_is_noticed_from_outside(mortal):
    healthy = Healthy(mortal)
    worker = mortal.worker()
    os.kill(worker, signal.SIGSTOP)
    with mortal.http() as http:
        until(lambda: http.get("/readyz").status_code == 503)
    until(lambda: mortal.children() not in ([], [worker]))
    healthy()


def test_a_worker_that_cannot_be_started_again_ends_the_server(tmp_path):
    """Its sockets' folder is removed, as by a cleaner of temporary files, and then the worker dies."""
    with serving(tmp_path, fault_model(tmp_path / "model")) as server:
        (folder,) = tmp_path.glob("safelight-*")
        shutil.rmtree(folder)
        os.kill(server.worker(), signal.SIGKILL)
        assert server.process.wait(20) == 70
    assert "died again and again" in server.log.read_text()
