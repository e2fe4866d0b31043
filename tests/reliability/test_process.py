"""The processes: how they start, what they hold, and how they end."""

from __future__ import annotations

import base64
import contextlib
import json
import re
import signal
import socket
import subprocess
import threading
import time
from functools import partial
from pathlib import Path

import httpx
import pytest

from tests.live_server import alive, command, environment, fault_model, free_port, generate, serving
from tests.reliability.conftest import until


def tree(server):
    return [server.process.pid, *server.children()]


def test_one_door_and_no_torch_in_the_api_process(pictures):
    """One listening TCP socket in the process tree; the API process is small and has no torch."""
    inodes = set()
    for pid in tree(pictures):
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # it was closed meanwhile
                if found := re.fullmatch(r"socket:\[(\d+)\]", str(link.readlink())):
                    inodes.add(found[1])
    listening = [
        line.split()
        for table in ("tcp", "tcp6")
        for line in Path(f"/proc/{pictures.process.pid}/net/{table}").read_text().splitlines()[1:]
    ]
    ours = [row[1] for row in listening if row[3] == "0A" and row[9] in inodes]
    assert ours == [f"0100007F:{pictures.port:04X}"]
    with pictures.http() as http:
        for seed in range(5):
            assert generate(http, seed=seed).status_code == 200
    maps = Path(f"/proc/{pictures.process.pid}/maps").read_text()
    assert "torch" not in maps
    assert peak_memory(pictures) < 200 << 20
    (folder,) = Path(pictures.log.parent).glob("safelight-*")
    assert folder.stat().st_mode & 0o777 == 0o700


def peak_memory(server):
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    resident = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert resident is not None
    return int(resident[1]) << 10


@pytest.mark.slow
def test_long_videos_do_not_pass_through_the_api_processs_memory(tmp_path):
    """Each has 97 MB of frames, which are encoded from a file that is gone when they are; two come at once."""
    with serving(tmp_path, fault_model(tmp_path / "model", "FaultVideoPipeline")) as server, server.http() as http:
        asked = {"prompt": "a cat", "num_frames": 81, "height": 480, "width": 832, "num_inference_steps": 1}
        paths = [f"/v1/videos/{http.post('/v1/videos', json=asked).json()['id']}" for _ in range(2)]
        until(lambda: all(http.get(path).json()["status"] == "completed" for path in paths), 60)
        assert peak_memory(server) < 200 << 20
        assert not list(tmp_path.glob("safelight-*/*.frames"))


REFUSED = {
    "unknown flag": (["--frobnicate"], 2, "frobnicate"),
    "port 0": (["--port", "0"], 2, "port"),
    "port 65536": (["--port", "65536"], 2, "port"),
    "a host for all without a key": (["--host", "0.0.0.0"], 2, "api-key-file"),
    "a key file that is not there": (["--api-key-file", "/nowhere/key"], 2, "api_key_file"),
    "batching": (["--batching", "sometimes"], 2, "batching"),
    "share": (["--share", "2"], 2, "share"),
    "no model": (["/nowhere/model"], 3, "model"),
    "a device that there is not": (["--device", "cuda:7"], 2, "device"),
}


@pytest.mark.parametrize(("arguments", "code", "names"), REFUSED.values(), ids=REFUSED)
def test_a_bad_start_is_one_line_and_an_exit_code(tmp_path, arguments, code, names):
    state = ["--state-dir", str(tmp_path / "state"), "--port", str(free_port())]
    known = {argument for argument in arguments if argument.startswith("--")}
    if "--port" in known:
        state = state[:2]
    refuse(arguments + state, code, names)


def refuse(arguments, code, names):
    ended = subprocess.run(
        command("serve", *arguments),
        capture_output=True,
        text=True,
        timeout=60,
        env=environment(),
        stdin=subprocess.DEVNULL,
    )
    lines = [line for line in ended.stderr.splitlines() if not line.startswith("safelight: loading")]
    assert ended.returncode == code, ended.stderr
    assert len(lines) == 1 and names in lines[0] and "Traceback" not in ended.stderr, ended.stderr
    assert ended.stdout == ""


def test_a_port_that_is_taken(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        refuse(["--port", str(taken.getsockname()[1]), "--state-dir", str(tmp_path / "state")], 4, "port")


def test_a_state_directory_that_cannot_be_used(tmp_path, pictures):
    (tmp_path / "file").write_text("")
    port = ["--port", str(free_port())]
    refuse([*port, "--state-dir", str(tmp_path / "file")], 5, "state")
    refuse([*port, "--state-dir", str(pictures.log.parent / "state")], 5, "state")


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("colour: red\n", "colour"),
        ("port: nine\n", "port"),
        ("!!python/object/apply:os.system ['touch /tmp/owned']\n", "YAML"),
        ("- 1\n", "settings"),
        ("port: [1\n", "YAML"),
        ("warm_up: 3\n", "warm_up"),
    ],
)
def test_a_config_file_that_is_wrong(tmp_path, text, names):
    (tmp_path / "config.yaml").write_text(text)
    refuse(["--config", str(tmp_path / "config.yaml")], 2, names)
    assert not Path("/tmp/owned").exists()


INDEXES = {
    "hostile": {"_class_name": "os.system"},
    "unknown": {"_class_name": "NoSuchPipeline"},
    "hostile component": {"_class_name": "FluxPipeline", "vae": ["os", "system"]},
}


@pytest.mark.parametrize(
    "index",
    [
        pytest.param(index, id=name, marks=[] if name == "hostile component" else pytest.mark.slow)
        for name, index in INDEXES.items()
    ],
)
def test_a_model_that_is_none(tmp_path, index):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model_index.json").write_text(json.dumps(index))
    state = ["--state-dir", str(tmp_path / "state"), "--port", str(free_port())]
    refuse([str(tmp_path / "model"), *state], 3, "model_index.json")


def test_sigterm_lets_running_requests_finish(tmp_path):
    """Not ready at once, nothing new, what runs is finished, exit code 0, and nothing is left over."""
    with serving(tmp_path, fault_model(tmp_path / "model", step_seconds=0.05)) as server:
        answers = []

        def ask():
            with server.http() as http:
                answers.append(generate(http, num_inference_steps=40).status_code)

        thread = threading.Thread(target=ask)
        thread.start()
        with server.http() as http:
            until(lambda: "safelight_requests_running 1.0" in http.get("/metrics").text)
            workers = server.children()
            server.process.send_signal(signal.SIGTERM)
            until(lambda: http.get("/readyz").status_code == 503, 1)
            assert generate(http).status_code == 503
            assert http.get("/livez").status_code == 200
        thread.join(30)
        assert answers == [200]
        assert server.process.wait(20) == 0
        assert not [pid for pid in workers if alive(pid)]


def test_a_second_sigterm_does_not_wait(tmp_path):
    with serving(tmp_path, fault_model(tmp_path / "model", step_seconds=0.05)) as server:
        with server.http() as http:
            job = http.post(
                "/v1/images/generations",
                json={"prompt": "x", "num_inference_steps": 1000},
                headers={"prefer": "respond-async"},
            ).json()
            until(lambda: http.get(f"/v1/jobs/{job['id']}").json()["step"])
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        begun = time.monotonic()
        assert server.stop() == 0
        assert time.monotonic() - begun < 15, "the job would have taken 50 s"


def test_a_worker_whose_server_is_killed_ends(tmp_path):
    with serving(tmp_path, fault_model(tmp_path / "model")) as server:
        worker = server.worker()
        server.process.kill()
        server.process.wait(10)
        until(lambda: not alive(worker), 10)


@pytest.mark.slow
def test_three_deaths_end_the_server(tmp_path):
    with serving(tmp_path, fault_model(tmp_path / "model")) as server:
        with server.http() as http:
            for _ in range(3):
                server.wait_ready(60)
                assert generate(http, "[exit@encoding] a cat").status_code == 503
        assert server.process.wait(20) == 70
        assert "died" in server.log.read_text()


@pytest.mark.slow
def test_jobs_survive_the_death_of_the_server(tmp_path):
    """Killed at twenty moments: every accepted job is completed once, with the bytes of a server that lived.

    Each is killed once at most, since the jobs of the server before are waited for: after two deaths it would be over.
    """
    model = fault_model(tmp_path / "model", step_seconds=0.01)
    accepted: dict[int, str] = {}
    expected: dict[int, str] = {}

    def ended(http: httpx.Client, job_id: str) -> bool:
        return http.get(f"/v1/jobs/{job_id}").json()["completed_at"] is not None

    for name in ("lives", "dies"):
        (tmp_path / name).mkdir()
    with serving(tmp_path / "lives", model) as server, server.http() as http:
        for seed in range(40):
            expected[seed] = generate(http, "a job", seed=seed).json()["data"][0]["b64_json"]
    for moment in range(20):
        with serving(tmp_path / "dies", model) as server, server.http() as http:
            for job_id in accepted.values():
                until(partial(ended, http, job_id), 60)
            for seed in (2 * moment, 2 * moment + 1):
                body = {"prompt": "a job", "seed": seed}
                answer = http.post("/v1/images/generations", json=body, headers={"prefer": "respond-async"})
                if answer.status_code == 202:
                    accepted[seed] = answer.json()["id"]
            time.sleep(0.013 * moment)
            server.process.kill()
            server.process.wait(10)
    assert len(accepted) == 40
    with serving(tmp_path / "dies", model) as server, server.http() as http:
        for seed, job_id in accepted.items():
            while http.get(f"/v1/jobs/{job_id}").json()["state"] in ("queued", "in_progress"):
                time.sleep(0.01)
            job = http.get(f"/v1/jobs/{job_id}").json()
            assert job["state"] == "completed", job
            made = http.get(f"/v1/jobs/{job_id}/content").content
            assert base64.b64encode(made).decode() == expected[seed]


def test_no_code_from_a_repository_runs(tmp_path):
    """A repository full of traps: none of its code is run, and no file outside is read for a client."""
    model = fault_model(tmp_path / "model")
    for name in ("__init__.py", "pipeline.py", "modeling_fault.py", "sitecustomize.py"):
        (model / name).write_text(f"open({str(tmp_path / 'owned')!r}, 'w').write('x')\n")
    (model / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch owned'\ntR.")
    with serving(tmp_path, model) as server, server.http() as http:
        assert generate(http).status_code == 200
        for value in ("/etc/passwd", "file:///etc/passwd", "http://127.0.0.1:1/x", "../../x"):
            answer = http.post("/v1/images/generations", json={"prompt": "x", "image": [value]})
            assert answer.status_code == 400 and answer.json()["error"]["param"] == "image"
    assert not (tmp_path / "owned").exists() and not (model / "owned").exists()
