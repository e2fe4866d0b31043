"""Hundreds of requests from sixteen clients: each has its own answer, once, and nothing grows."""

from __future__ import annotations

import re
import threading
from pathlib import Path

import pytest

from tests.live_server import fault_model, generate, serving

NUM_CLIENTS = 16
WARM_UP = 200
KIB_EACH = 5.0
SLACK_KIB = 16 * 1024


def resident(pid: int) -> int:
    """Return a process's memory, in KiB."""
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    return int(found[1])


@pytest.mark.parametrize("num_requests", [400, pytest.param(5000, marks=pytest.mark.slow)])
def test_many_requests(tmp_path, num_requests):
    answers: dict[int, list[tuple[int, str]]] = {seed: [] for seed in range(WARM_UP + num_requests)}

    def ask(seeds):
        with server.http(60) as http:
            for seed in seeds:
                answer = generate(http, "a cat", seed=seed, num_inference_steps=2)
                data = answer.json()["data"][0]
                answers[seed].append((data["seed"], data["b64_json"]))

    def run(seeds):
        threads = [threading.Thread(target=ask, args=(seeds[client::NUM_CLIENTS],)) for client in range(NUM_CLIENTS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(300)

    with serving(tmp_path, fault_model(tmp_path / "model")) as server:
        run(range(WARM_UP))
        pids = [server.process.pid, server.worker()]
        before = sum(map(resident, pids))
        num_descriptors = [len(list(Path(f"/proc/{pid}/fd").iterdir())) for pid in pids]
        run(range(WARM_UP, WARM_UP + num_requests))
        grown = sum(map(resident, pids)) - before
        assert grown <= KIB_EACH * num_requests + SLACK_KIB, f"{grown} KiB for {num_requests} requests"
        for pid, count in zip(pids, num_descriptors, strict=True):
            assert len(list(Path(f"/proc/{pid}/fd").iterdir())) <= count + NUM_CLIENTS
    assert all(len(found) == 1 and found[0][0] == seed for seed, found in answers.items())
    pictures = {found[0][1] for found in answers.values()}
    assert len(pictures) == len(answers), "each has the picture of its own seed"
