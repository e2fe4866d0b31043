"""A jobs' database that is damaged, gone, or cannot be written: refused by its name, told truly, and never deleted."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from safelight.errors import StateDirectoryError, StorageFailedError
from tests.live_server import LiveServer, command, environment, fault_model, free_port
from tests.serving.http_server import PROMPT, assert_error, running
from tests.serving.job_server import serving

ASYNC = {"prefer": "respond-async"}


def made(tmp_path, jobs=40):
    async def use(server):
        for number in range(jobs):
            await server.jobs.cancel((await server.submit(f"{'x' * 4000} {number} [hold]")).id)

    state = tmp_path / "state"
    serving(state, use)
    return state


DAMAGES = {
    "no database": lambda data: b"this is no database. " * 1000,
    "its beginning": lambda data: bytes(100) + data[100:],
    "its end": lambda data: data[: len(data) // 2],
    "its pages": lambda data: data[:100] + bytes(byte ^ 0x55 for byte in data[100:]),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_start_refuses_a_damaged_database_by_its_name_and_keeps_it(tmp_path, damage):
    state = made(tmp_path)
    path = state / "jobs.sqlite3"
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    before = path.read_bytes()
    with pytest.raises(StateDirectoryError, match=r"jobs\.sqlite3: the jobs' database is damaged") as error:
        serving(state, None)
    assert error.value.exit_code == 5 and path.read_bytes() == before


def test_the_process_ends_in_one_line(tmp_path):
    """What is found only when the jobs are looked for is told so too."""
    state = made(tmp_path)
    path = state / "jobs.sqlite3"
    data = bytearray(path.read_bytes())
    for page in range(2, len(data) // 4096):
        data[page * 4096 : page * 4096 + 8] = b"\xff" * 8
    path.write_bytes(data)
    model = fault_model(tmp_path / "model")
    arguments = ["serve", str(model), "--port", str(free_port()), "--state-dir", str(state)]
    done = subprocess.run(command(*arguments), env=environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 5, done.stderr
    (line,) = done.stderr.splitlines()
    assert "jobs.sqlite3" in line and "damaged" in line and path.exists()


@pytest.mark.parametrize("how", ["removed", "replaced", "moved"])
def test_a_database_that_is_gone_takes_no_job(tmp_path, how):
    """What would be written into a file without a name would be lost at the next start."""
    with running(tmp_path) as server, server.http() as http:
        generation = {"prompt": f"{PROMPT} [hold]"}
        held = http.post("/v1/images/generations", json=generation, headers=ASYNC).json()["id"]
        state = tmp_path / "state"
        shutil.copy(state / "jobs.sqlite3", tmp_path / "other")
        if how == "moved":
            state.rename(tmp_path / "elsewhere")
        else:
            (state / "jobs.sqlite3").unlink()
        if how == "replaced":
            shutil.copy(tmp_path / "other", state / "jobs.sqlite3")
        assert assert_error(http.get("/readyz"), 503)["code"] == "not_ready"
        refused = http.post("/v1/images/generations", json=generation, headers=ASYNC)
        assert assert_error(refused, 503)["code"] == StorageFailedError.code
        assert http.get("/livez").status_code == 200
        if how == "moved":
            (tmp_path / "elsewhere").rename(state)
            assert http.get("/readyz").status_code == 200
            server.call(server.engine.release)
            server.until(lambda: held not in server.jobs.runner.runs)
            assert http.get(f"/v1/jobs/{held}").json()["state"] == "completed"


@pytest.mark.parametrize("stream", ["/dev/full", pytest.param("closed", marks=pytest.mark.slow)])
def test_a_log_that_takes_nothing_ends_no_server(tmp_path, stream):
    """Its lines to people, its log and its worker's go to a full disk, or nowhere."""
    port = free_port()
    model = fault_model(tmp_path / "model")
    arguments = command("serve", str(model), "--port", str(port), "--state-dir", str(tmp_path / "state"))
    shell = 'exec "$@" >/dev/full 2>/dev/full' if stream == "/dev/full" else 'exec "$@" >&- 2>&-'
    process = subprocess.Popen(
        ["sh", "-c", shell, "sh", *arguments], env={**environment(), "TMPDIR": str(tmp_path)}, stdin=subprocess.DEVNULL
    )
    log = tmp_path / "log"
    log.touch()
    server = LiveServer(process, port, log)  # type: ignore[arg-type]
    try:
        server.wait_ready()
        with server.http() as http:
            for prompt in ("a", "[raise@denoising]", "[exit@denoising]", "b"):
                answer = http.post("/v1/images/generations", json={"prompt": prompt})
                assert answer.status_code in (200, 500, 503), answer.text
            server.wait_ready()
            assert http.post("/v1/images/generations", json={"prompt": "b"}).status_code == 200
        assert server.stop() == 0
    finally:
        process.kill()
        process.wait(30)
