"""The real server on a stub engine, to be run on a failing disk: `python -m tests.serving.failing_server FOLDER KIND`.

It prints its port, and ends when its standard input does.
"""

from __future__ import annotations

import sys
from pathlib import Path

from safelight.serving.jobs.limits import JobLimits
from tests.serving.http_server import running
from tests.serving.stub_engine import EDIT_SCHEMA, VIDEO_SCHEMA

SCHEMAS = {"image": EDIT_SCHEMA, "video": VIDEO_SCHEMA}


def main(folder: Path, kind: str) -> None:
    limits = JobLimits(retry_seconds=0.02, busy_seconds=0.3, sweep_seconds=0.5)
    with running(folder, SCHEMAS[kind], job_limits=limits) as server:
        print(server.port, flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
