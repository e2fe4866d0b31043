"""`DiffusionGenerator` and the server on two ranks: the pictures of one, through the whole way of a user."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch

from safelight import DiffusionGenerator
from safelight.errors import InvalidParameterError, SafelightError
from tests.live_server import environment, fault_model, free_port
from tests.parallel.checkpoints import build
from tests.recipes import all_recipes
from tests.reliability.traps import set_traps

PROMPT = "a photo of a cat sitting on a red chair"
FIELDS = {"height": 48, "width": 80, "num_inference_steps": 3, "seed": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build(all_recipes()["FluxPipeline"], "default", tmp_path_factory.mktemp("flux") / "model")


@pytest.fixture(scope="module")
def alone(folder):
    with DiffusionGenerator.from_pretrained(folder, device="cpu") as generator:
        return {
            output_type: generator.generate(PROMPT, output_type=output_type, **FIELDS).images
            for output_type in ("np", "latent", "pil")
        }


@pytest.mark.parametrize("settings", [{"tp_size": 2}, {"devices": 2}], ids=str)
@pytest.mark.slow
def test_two_ranks_by_the_python_api(folder, alone, settings):
    with DiffusionGenerator.from_pretrained(folder, device="cpu", **settings) as generator:
        made = generator.generate(PROMPT, output_type="np", **FIELDS)
        assert np.abs(made.images - alone["np"]).max() < 1e-5
        latents = generator.generate(PROMPT, output_type="latent", **FIELDS).images
        assert torch.stack(list(latents)).sub(torch.stack(list(alone["latent"]))).abs().max() < 1e-5
        difference = np.array(generator.generate(PROMPT, **FIELDS).images[0], int) - np.array(alone["pil"][0], int)
        assert np.abs(difference).max() <= 1
        stream = generator.stream(PROMPT, **{**FIELDS, "num_inference_steps": 500})
        for event in stream:
            if event.step >= 2:
                break
        del stream, event  # whoever leaves the loop closes it
        with pytest.raises(InvalidParameterError, match="width"):
            generator.generate(PROMPT, width=3)
        again = generator.generate(PROMPT, output_type="np", **FIELDS)
        assert np.array_equal(again.images, made.images)


def test_what_cannot_be_divided_is_refused_by_name(folder):
    with pytest.raises(SafelightError, match="tp_size: got 3; it takes a divisor of the 4 heads"):
        DiffusionGenerator.from_pretrained(folder, device="cpu", tp_size=3)


@pytest.mark.slow
def test_ranks_that_torchrun_started(tmp_path, fault_path):
    """Rank 0 serves, and rank 1 follows; both end when the server is told to stop. They run in a folder of traps."""
    model, port, log = fault_model(tmp_path / "model"), free_port(), tmp_path / "log"
    told = set_traps(model)
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        meeting = found.getsockname()[1]
    command = [sys.executable, "-P", "-m", "torch.distributed.run"]  # as the script `torchrun` does it
    command += ["--nproc-per-node", "2", "--master-port", str(meeting)]
    script = str(Path(sys.executable).with_name("safelight"))
    serve = ["--no-python", script, "serve", str(model), "--port", str(port), "--state-dir", str(tmp_path / "s")]
    with log.open("w") as stream:
        process = subprocess.Popen(
            [*command, *serve, "--cfg-parallel-size", "2", "--device", "cpu"],
            stdout=stream,
            stderr=stream,
            env=environment(),
            cwd=model,
        )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as http:
            end = time.monotonic() + 60
            while True:
                assert time.monotonic() < end and process.poll() is None, log.read_text()
                try:
                    if http.get("/readyz").status_code == 200:
                        break
                except httpx.HTTPError:
                    time.sleep(0.2)
            body = {"prompt": "a cat", "seed": 0, "guidance_scale": 3.0}
            made = [http.post("/v1/images/generations", json=body).json()["data"][0]["b64_json"] for _ in range(2)]
            assert made[0] == made[1]
        assert not told.exists(), told.read_text()
        process.terminate()
        process.wait(40)
    finally:
        process.kill()
