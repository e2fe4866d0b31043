"""A whole server whose clock jumps by ten years while a job runs: nothing is negative, expired or deleted."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.live_server import LiveServer, environment, fault_model, free_port

ROOT = Path(__file__).parents[2]
YEARS = 10 * 365 * 24 * 3600.0
SAMPLE = re.compile(r"^safelight_(\w+?)(?:\{[^}]*\})? (\S+)$", re.MULTILINE)


@contextlib.contextmanager
def serving(tmp_path, clock, *arguments):
    port, log = free_port(), tmp_path / "log"
    command = [sys.executable, "-m", "tests.serving.clock_hook", "serve", str(tmp_path / "model"), "--port", str(port)]
    env = {**environment(), "TMPDIR": str(tmp_path), "CLOCK_OFFSET_FILE": str(clock)}
    env["PYTHONPATH"] = f"{ROOT}:{env['PYTHONPATH']}"
    options = ["--state-dir", str(tmp_path / "state"), *arguments]
    with log.open("a") as stderr:
        process = subprocess.Popen([*command, *options], stderr=stderr, env=env, text=True, cwd=ROOT)
        server = LiveServer(process, port, log)
        try:
            server.wait_ready()
            yield server
            assert server.stop(signal.SIGTERM) == 0
        finally:
            process.kill()
            process.wait(30)


def submit(http: httpx.Client, prompt: str) -> str:
    answer = http.post("/v1/images/generations", json={"prompt": prompt}, headers={"prefer": "respond-async"})
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])


def end(http: httpx.Client, job_id: str) -> dict[str, Any]:
    job: dict[str, Any]
    until = time.monotonic() + 60
    while (job := http.get(f"/v1/jobs/{job_id}").json())["state"] not in ("completed", "failed"):
        assert time.monotonic() < until, job
        time.sleep(0.02)
    return job


def check(http: httpx.Client, jobs: list[str]) -> None:
    for job_id in jobs:
        job = http.get(f"/v1/jobs/{job_id}").json()
        assert job["state"] == "completed" and job["error"] is None, job
        address = job["outputs"][0]["url"]
        assert http.get(address).status_code == 200, "what is kept has an address that opens"
    samples = [(name, float(value)) for name, value in SAMPLE.findall(http.get("/metrics").text)]
    sums = [value for name, value in samples if name.endswith("_seconds_sum")]
    assert sums and all(0 <= value < 600 for value in sums), samples
    assert all(value >= 0 for _, value in samples)


@pytest.mark.parametrize("years", [YEARS, -YEARS])
@pytest.mark.slow
def test_a_server_whose_clock_jumps(tmp_path, years):
    clock = tmp_path / "clock"
    clock.write_text("0")
    fault_model(tmp_path / "model", step_seconds=0.2)
    with serving(tmp_path, clock, "--keep-hours", "1") as server, server.http() as http:
        first = submit(http, "before")
        end(http, first)
        jobs = [submit(http, "during")]
        time.sleep(0.2)
        clock.write_text(str(years))
        end(http, jobs[0])
        url = http.post("/v1/images/generations", json={"prompt": "url", "response_format": "url"})
        assert (
            url.status_code == 200 and 0 <= url.json()["metrics"]["queue_seconds"] <= url.json()["metrics"]["seconds"]
        )
        assert url.json()["metrics"]["seconds"] < 60
        assert http.get(url.json()["data"][0]["url"]).status_code == 200
        jobs.append(submit(http, "back"))
        check(http, [first, jobs[0]])
        clock.write_text("0")
        end(http, jobs[1])
        assert http.get(url.json()["data"][0]["url"]).status_code == 200
        check(http, [first, *jobs])
        assert http.get("/readyz").status_code == 200
    clock.write_text(str(years))
    with serving(tmp_path, clock, "--keep-hours", "1") as server, server.http() as http:
        time.sleep(0.5)  # what a first sweep removes is gone
        for job_id in [first, *jobs]:
            assert http.get(f"/v1/jobs/{job_id}").json()["state"] == "completed"
    assert len(list((tmp_path / "state" / "outputs").glob("image_*.png"))) == 4
    assert os.environ.get("CLOCK_OFFSET_FILE") is None
