"""Schemathesis against live servers: `make fuzz`. No 5xx, nothing that `/openapi.json` does not say, no worker lost."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.live_server import LiveServer, fault_model, serving

CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "response_headers_conformance",
    "unsupported_method",
)
NAMES = {"image": "FaultPipeline", "video": "FaultVideoPipeline"}
"""The model that a server has."""


def known_ids(server: LiveServer, kind: str) -> dict[str, str]:
    """Make a job, so that not every id that is tried is unknown; return the values of parameters in paths."""
    with server.http() as http:
        (model,) = http.get("/v1/models").raise_for_status().json()["data"]
        if kind == "video":
            video = http.post("/v1/videos", json={"prompt": "a cat"}).raise_for_status().json()["id"]
            return {"model": model["id"], "video_id": video, "job_id": video}
        headers = {"prefer": "respond-async"}
        job = http.post("/v1/images/generations", json={"prompt": "a cat"}, headers=headers).raise_for_status().json()
        return {"model": model["id"], "video_id": job["id"], "job_id": job["id"]}


def fuzz(schemathesis: Path, server: LiveServer, ids: dict[str, str], seconds: int, folder: Path) -> bool:
    """Run schemathesis; say whether it found nothing and the server is as it was."""
    worker = server.worker()
    config = folder / "schemathesis.toml"
    config.write_text("[parameters]\n" + "".join(f'"path.{name}" = {json.dumps(ids[name])}\n' for name in ids))
    command = [str(schemathesis), "--config-file", str(config), "--no-color", "run", f"{server.url}/openapi.json"]
    options = ["--max-time", str(seconds), "--continue-on-failure", "--checks", ",".join(CHECKS)]
    found = subprocess.run([*command, *options], cwd=folder, check=False).returncode
    with server.http() as http:
        healthy = http.get("/readyz").status_code == 200
    return found == 0 and healthy and server.worker() == worker


def main() -> None:
    """Fuzz a server of each kind; end with 1 if anything was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--schemathesis", type=Path, required=True, help="its program")
    parser.add_argument("--seconds", type=int, default=120, help="for each server")
    args = parser.parse_args()
    fine = True
    for kind, pipeline_name in NAMES.items():
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            with serving(folder, fault_model(folder / "model", pipeline_name)) as server:
                fine &= fuzz(args.schemathesis.resolve(), server, known_ids(server, kind), args.seconds, folder)
    sys.exit(not fine)


if __name__ == "__main__":
    main()
