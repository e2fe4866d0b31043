"""What Prometheus is told."""

from __future__ import annotations

import re
import time

from tests.serving.http_server import PROMPT, running
from tests.serving.wire import (
    ASYNC,
    GENERATIONS,
    finished_job,
)


def test_metrics(tmp_path):
    with running(tmp_path, step_seconds=0.005) as server, server.http() as http:
        http.post(GENERATIONS, json={"prompt": PROMPT, "n": 2})
        http.post(GENERATIONS, json={"prompt": PROMPT, "size": "x"})
        http.post(GENERATIONS, json={"prompt": "[fail:out_of_memory]", "stream": True})
        finished_job(http, http.post(GENERATIONS, json={"prompt": PROMPT}, headers=ASYNC).json()["id"])
        http.post(GENERATIONS, json={"prompt": "[fail:out_of_memory]", "response_format": "url"})
        end = time.monotonic() + 10  # jobs are counted when they have ended, which their clients hear first
        while 'requests_total{status="503",task="T2I"} 2.0' not in http.get("/metrics").text:
            assert time.monotonic() < end
        text = http.get("/metrics").text
    for line in (
        'safelight_requests_total{status="200",task="T2I"} 2.0',
        'safelight_requests_total{status="400",task="T2I"} 1.0',
        'safelight_errors_total{code="invalid_value"} 1.0',
        "safelight_outputs_total 3.0",
        "safelight_requests_running 0.0",
        "safelight_requests_waiting 0.0",
        "safelight_request_duration_seconds_count 2.0",
        "safelight_queue_seconds_count 2.0",
        'safelight_stage_seconds_count{stage="denoising"} 2.0',
        "safelight_gpu_memory_bytes 0.0",
        "safelight_model_load_seconds 0.0",
    ):
        assert line in text, line
    counts = [
        line.split()[1] for line in text.splitlines() if re.match("safelight_(step_seconds|batch_size)_count ", line)
    ]
    assert len(counts) == 2 and counts[0] == counts[1] and float(counts[0]) >= 3
