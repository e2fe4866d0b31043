"""P3 in its hardest form: the working directory is a downloaded folder with a module for every name that is known."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from safelight.acceleration.compile import CACHE_VARIABLE
from safelight.loading.repository import SHIPPED_MODEL
from safelight.runtime import processes
from safelight.runtime.supervisor import group
from safelight.runtime.worker import background
from tests.live_server import environment, fault_model, generate, serving
from tests.reliability.conftest import until
from tests.reliability.traps import set_traps

SMALL = ("--height", "16", "--width", "16", "--num-inference-steps", "1")


def run(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a command line of ours in a folder."""
    known = {**environment(), **variables}
    return subprocess.run(
        list(arguments), cwd=folder, env=known, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL
    )


def test_a_server_in_a_folder_of_traps(tmp_path):
    model = fault_model(tmp_path / "model")
    told = set_traps(model)
    with serving(tmp_path, model, where=model) as server, server.http() as http:
        assert generate(http).status_code == 200
        assert generate(http, "[exit@encoding] a cat").status_code == 503
        server.wait_ready(60)
    assert not told.exists(), told.read_text()


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", "a cat", *SMALL, "-o", "cat.png"),
        pytest.param(("check-model", str(SHIPPED_MODEL), *SMALL), marks=pytest.mark.slow),
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_command_in_a_folder_of_traps(tmp_path, arguments):
    told = set_traps(tmp_path)
    ended = run(tmp_path, str(Path(sys.executable).with_name("safelight")), *arguments)
    assert ended.returncode == 0, ended.stderr
    assert not told.exists(), told.read_text()


def test_the_command_line_alone_is_safe(tmp_path):
    """Whatever the environment is that a process of ours gets."""
    told = set_traps(tmp_path)
    plain = {name: value for name, value in os.environ.items() if name not in ("PYTHONSAFEPATH", "PYTHONPATH")}
    subprocess.run(processes.python_command("safelight.version"), env=plain, cwd=tmp_path, check=True, timeout=60)
    assert not told.exists(), told.read_text()


def test_whoever_starts_a_process_guards_it(monkeypatch):
    """In a process of a user's too, where no command line of ours has guarded everything below it."""
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    monkeypatch.setenv("PYTHONPATH", ":/a:")
    environments = [group.worker_environment()]

    def started(command, env=None, **_):
        environments.append(dict(os.environ) if env is None else env)
        raise OSError("this is enough")

    monkeypatch.setattr(subprocess, "Popen", started)
    with pytest.raises(OSError, match="enough"):
        background.BackgroundCompiler(None, 1.0)  # type: ignore[arg-type]  # the process comes first
    assert [(each.get("PYTHONSAFEPATH"), each.get("PYTHONPATH")) for each in environments] == [("1", "/a")] * 2


def test_a_command_guards_what_it_starts():
    script = "import atexit, os, sys; atexit.register(lambda: print(os.environ.get('PYTHONSAFEPATH')));"
    script += "sys.argv = ['safelight', '--version']; from safelight.cli.main import main; main()"
    plain = {name: value for name, value in environment().items() if name != "PYTHONSAFEPATH"}
    ended = subprocess.run([sys.executable, "-c", script], env=plain, capture_output=True, text=True, timeout=60)
    assert ended.stdout.splitlines()[-1] == "1", ended.stderr


@pytest.mark.parametrize("module", ["safelight.runtime.worker.background", "safelight.runtime.worker.process"])
def test_a_process_of_ours_in_a_folder_of_traps(tmp_path, monkeypatch, module):
    """They import what they need, and end because they are told nothing."""
    told = set_traps(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["", *os.environ.get("PYTHONPATH", "").split(os.pathsep), ""]))
    ended = subprocess.run(
        processes.python_command(module),
        env=processes.safe_environment(),
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "Error" in ended.stderr
    assert not told.exists(), told.read_text()


@pytest.mark.parametrize(("known", "kept"), [(None, None), ("", None), (":", None), ("/a::/b:", "/a:/b")])
def test_what_our_processes_start_looks_in_no_working_directory(tmp_path, monkeypatch, known, kept):
    """A Python that a library starts, with `-c` or `-m`, as Inductor does."""
    told = set_traps(tmp_path)
    if known is None:
        monkeypatch.delenv("PYTHONPATH", raising=False)
    else:
        monkeypatch.setenv("PYTHONPATH", known)
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    assert processes.safe_environment().get("PYTHONPATH") == kept
    with monkeypatch.context() as patch:
        patch.setattr(os, "environ", dict(os.environ))
        processes.guard_children()
        again = dict(os.environ)
    subprocess.run([sys.executable, "-c", "import uuid"], env=again, cwd=tmp_path, check=True, timeout=60)
    assert not told.exists(), told.read_text()


@pytest.mark.slow
def test_compiling_in_the_background_in_a_folder_of_traps(tmp_path, monkeypatch):
    """The compiling process, and Inductor's own processes below it."""
    from tests.recipes import all_recipes

    model = tmp_path / "model"
    all_recipes()["FluxPipeline"].build(model, "default")
    told = set_traps(model)
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    with serving(tmp_path, model, "--device", "cpu", "--compile", "blocks", where=model) as server:
        until(lambda: "the model is compiled" in server.log.read_text(), 300)
    assert not told.exists(), told.read_text()
