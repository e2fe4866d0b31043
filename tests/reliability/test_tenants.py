"""Two keys on a live server: whatever one of them sends, the other has its share."""

from __future__ import annotations

import time
from functools import partial

import httpx
import pytest
import yaml

from tests.live_server import fault_model, serving
from tests.reliability.conftest import until

KEYS = {"loud": "sk-loud-0123456789", "quiet": "sk-quiet-0123456789"}
PRIORITY = {"loud": 5, "quiet": 0}
"""Of every request: without shares the one would leave the other a tenth."""
STEP = 0.02
STEPS = 20


@pytest.fixture
def server(tmp_path):
    """Return a server of two keys, whose model takes a while for a step."""
    path = tmp_path / "keys.yaml"
    path.write_text(
        yaml.safe_dump({"keys": [{"name": name, "key": key, "priority": PRIORITY[name]} for name, key in KEYS.items()]})
    )
    model = fault_model(tmp_path / "model", step_seconds=STEP)
    with serving(tmp_path, model, "--api-key-file", str(path), key=KEYS["quiet"]) as server:
        yield server


def of_key(server, name):
    """Return a client."""
    headers = {"authorization": f"Bearer {KEYS[name]}"}
    return httpx.Client(base_url=server.url, headers=headers, timeout=60)


def ask(http, as_job=False, **fields):
    headers = {"prefer": "respond-async"} if as_job else {}
    name = next(name for name, key in KEYS.items() if key in http.headers["authorization"])
    asked = {"prompt": "x", "num_inference_steps": STEPS, "priority": PRIORITY[name], **fields}
    answer = http.post("/v1/images/generations", json=asked, headers=headers)
    assert answer.status_code == (202 if as_job else 200), answer.text
    return answer.json()


def completed(http):
    return sum(job["state"] == "completed" for job in http.get("/v1/jobs", params={"limit": 100}).json()["data"])


def is_completed(http, job_id):
    return http.get(f"/v1/jobs/{job_id}").json()["state"] == "completed"


@pytest.mark.parametrize("as_job", [False, True], ids=["answered", "jobs"])
def test_a_flood_of_one_keys_jobs_leaves_the_other_its_share(server, as_job):
    """Forty urgent jobs of two steps are always before what the other sends; without shares that would come last."""
    with of_key(server, "loud") as loud, of_key(server, "quiet") as quiet:
        for seed in range(40):
            ask(loud, as_job=True, seed=seed, num_inference_steps=2)
        began = time.monotonic()
        for seed in range(2):
            made = ask(quiet, as_job, seed=seed)
            if as_job:
                until(partial(is_completed, quiet, made["id"]), 60)
        num_others, seconds = completed(loud), time.monotonic() - began
        assert num_others < 40, f"the other key's jobs were all done first, in {seconds:.1f} s"
        until(lambda: completed(loud) == 40, 60)
