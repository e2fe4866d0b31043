"""A user without a home directory, as containers start programs: what needs one says what to set, all else works."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.live_server import LiveServer, command, free_port

STRANGER = 12345
NO_PASSWD = "import pwd\n\n\ndef unknown(user):\n    raise KeyError(user)\n\n\npwd.getpwuid = unknown\n"
AS_STRANGER = [
    *("setpriv", f"--reuid={STRANGER}", f"--regid={STRANGER}", "--clear-groups"),
    *("--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"),  # what is installed may lie in another's home
]


def can_be_a_stranger():
    if os.geteuid() != 0 or shutil.which("setpriv") is None:
        return False
    return subprocess.run([*AS_STRANGER, sys.executable, "-c", ""], check=False).returncode == 0


@pytest.fixture(params=[pytest.param("stranger", marks=pytest.mark.slow), "no entry"])
def homeless(request, tmp_path):
    """Return how a command line is started: its beginning, folder and environment.

    A stranger is a user whom the system does not know, which only root can start. Everywhere the same is had by a
    process to which the list of users is closed.
    """
    folder = tmp_path / "here"
    folder.mkdir()
    environment = {"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    if request.param == "stranger":
        if not can_be_a_stranger():
            pytest.skip("only root can start a program as another user")
        for parent in (tmp_path, tmp_path.parent, tmp_path.parent.parent):
            parent.chmod(0o755)
        folder.chmod(0o777)
        return AS_STRANGER, folder, environment
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(NO_PASSWD)
    return [], folder, environment | {"PYTHONPATH": str(tmp_path / "site")}


def run(homeless, *arguments, **variables):
    before, folder, environment = homeless
    return subprocess.run(
        [*before, *command(*arguments)],
        cwd=folder,
        env=environment | variables,
        capture_output=True,
        text=True,
        timeout=120,
        stdin=subprocess.DEVNULL,
    )


REFUSED = {
    "serve": (["serve"], 5, "--state-dir, SAFELIGHT_STATE_DIR"),
    "serve in a home": (["serve", "--state-dir", "~/state"], 5, "--state-dir"),
    "serve in another's home": (["serve", "--state-dir", "~nobody-at-all/state"], 5, "--state-dir"),
    "a key at home": (["serve", "--state-dir", "state", "--api-key-file", "~/key"], 2, "api_key_file"),
    "serve what is at home": (["serve", "~/model", "--state-dir", "state"], 3, "model: '~/model'"),
    "serve from the Hub": (["serve", "someone/model", "--state-dir", "state"], 3, "HF_HOME"),
    "generate from the Hub": (["generate", "a cat", "--model", "someone/model", "-o", "a.png"], 3, "HF_HOME"),
    "schema of the Hub's": (["schema", "someone/model"], 3, "HF_HOME"),
    "plan for the Hub's": (["plan", "someone/model", "--memory-limit", "2GiB"], 3, "HF_HOME"),
    "check the Hub's": (["check-model", "someone/model"], 3, "HF_HOME"),
    "compile": (["generate", "a cat", "--compile", "blocks", "-o", "a.png"], 3, "TORCHINDUCTOR_CACHE_DIR"),
    "serve compiled": (["serve", "--compile", "blocks", "--state-dir", "state"], 3, "TORCHINDUCTOR_CACHE_DIR"),
}


def slow(case):
    return [pytest.mark.slow] if case.startswith(("compile", "serve compiled", "serve what", "check")) else []


@pytest.mark.parametrize(
    ("arguments", "code", "says"), [pytest.param(*REFUSED[case], id=case, marks=slow(case)) for case in REFUSED]
)
def test_what_needs_a_home_says_what_to_set(homeless, arguments, code, says):
    if arguments[0] == "serve":
        arguments = [*arguments, "--port", str(free_port())]
    ended = run(homeless, *arguments)
    lines = [line for line in ended.stderr.splitlines() if not line.startswith("safelight: loading")]
    assert ended.returncode == code, ended.stderr
    assert len(lines) == 1 and says in lines[0] and "internal" not in lines[0], ended.stderr
    assert {path.name for path in homeless[1].iterdir()} <= {"state"}, "something was written elsewhere"


@pytest.mark.slow
def test_what_needs_none_works(homeless):
    picture = run(homeless, "generate", "a large red circle at the left on a white background", "-o", "a.png")
    assert picture.returncode == 0, picture.stderr
    for arguments in (["info", "a.png"], ["models"], ["schema"], ["plan", "--memory-limit", "2GiB"], ["env"]):
        ended = run(homeless, *arguments)
        assert ended.returncode == 0 and ended.stdout, ended.stderr
    assert [path.name for path in homeless[1].iterdir()] == ["a.png"]


@pytest.mark.slow
def test_a_server_and_compiling_work_once_they_have_their_folders(homeless, tmp_path):
    before, folder, environment = homeless
    port, log = free_port(), tmp_path / "log"
    compiled = {"TORCHINDUCTOR_CACHE_DIR": str(folder / "cache"), "TMPDIR": str(folder)}
    with log.open("w") as stderr:
        process = subprocess.Popen(
            [*before, *command("serve", "--port", str(port), "--compile", "blocks")],
            cwd=folder,
            env=environment | compiled | {"SAFELIGHT_STATE_DIR": str(folder / "state")},
            stderr=stderr,
            text=True,
        )
    server = LiveServer(process, port, log)
    try:
        server.wait_ready()
        with server.http() as http:
            assert http.post("/v1/images/generations", json={"prompt": "a cat"}).status_code == 200
    finally:
        assert server.stop(signal.SIGTERM) == 0, log.read_text()
    assert "internal" not in log.read_text() and "Traceback" not in log.read_text()
    assert {path.name for path in folder.iterdir()} <= {"state", "cache"}


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0 or not can_be_a_stranger(), reason="root may write everywhere")
@pytest.mark.parametrize("home", ["/", "/nonexistent", "/dev/null"])
@pytest.mark.parametrize("case", ["serve", "compile", "serve compiled"])
def test_a_home_that_cannot_be_written_says_so(tmp_path, home, case):
    arguments, code, says = REFUSED[case]
    folder = Path(tmp_path)
    for parent in (tmp_path.parent, tmp_path.parent.parent, folder):
        parent.chmod(0o755)
    (folder / "state").mkdir()
    (folder / "state").chmod(0o777)
    if arguments[0] == "serve":
        arguments = [*arguments, "--port", str(free_port())]
    output = ["-o", str(folder / "state" / "a.png")] if arguments[0] == "generate" else []
    environment = {"PATH": os.environ["PATH"], "HOME": home}
    ended = run((AS_STRANGER, folder, environment), *arguments, *output)
    assert ended.returncode == code and "internal" not in ended.stderr, ended.stderr
    assert "state directory" in ended.stderr if code == 5 else says in ended.stderr
