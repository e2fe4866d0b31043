"""However a worker's start fails, whoever waits for it is told the reason, and soon. A long name is no reason."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from safelight import DiffusionGenerator
from safelight.core.server_args import ServerArgs
from safelight.errors import PortError, SafelightError, WorkerStartError
from safelight.runtime import sockets
from safelight.runtime.settings import EngineSettings
from safelight.runtime.supervisor import group, supervisor
from safelight.runtime.supervisor.replicas import ReplicaSet
from safelight.runtime.supervisor.supervisor import Supervisor
from tests.live_server import command, environment, fault_model, free_port, generate, serving
from tests.runtime.workers import answer, ask, drive, pid_of, running

SOON = 5.0
"""Seconds from a failure to the reason. What comes before it, the interpreter and its imports, takes a second here."""


async def refused(**settings):
    """Start a supervisor that must fail; return the error, once nothing is left over."""
    failing = Supervisor(EngineSettings(ServerArgs(device="cpu"), **settings))
    with pytest.raises(SafelightError) as caught:
        await asyncio.wait_for(failing.start(), 2 * SOON)
    assert failing.state == "failed" and failing._task is not None and failing._task.done()
    return caught.value


def num_descriptors():
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Have the system's temporary files in a folder of this test, which must be empty afterwards."""
    folder = tmp_path / "t"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    assert not folder.is_dir() or not list(folder.glob("safelight-*")), "a socket's folder is left over"


NAMES = ["a" * 60, "b" * 90, "ü" * 50, "/".join(["c" * 200] * 4), os.fsdecode(b"d\xfc\xff")]


@pytest.mark.parametrize(
    "name",
    [*NAMES[-2:], *(pytest.param(name, marks=pytest.mark.slow) for name in NAMES[:-2])],
    ids=lambda name: name[:1],
)
def test_a_folder_of_any_length_holds_sockets(fault_family, fault_folder, folder, monkeypatch, name):
    long = folder / name
    long.mkdir(parents=True)
    monkeypatch.setattr(tempfile, "tempdir", str(long))

    async def test():
        async with running(fault_folder(name="served")) as supervisor:
            assert supervisor._folder.parent == long
            assert {path.name for path in supervisor._folder.iterdir()} == {"0.0.ipc", "0.unit"}
            await answer(ask(supervisor))

    before = num_descriptors()
    drive(test())
    assert not list(long.iterdir())
    assert num_descriptors() <= before + 1  # the event loop's own may come once


def test_without_a_short_way_a_long_name_is_said(folder, monkeypatch):
    monkeypatch.setattr(sockets, "DESCRIPTORS", str(folder / "none"))
    long = folder / ("a" * 120)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    error = asyncio.run(refused())
    assert isinstance(error, PortError) and "TMPDIR" in str(error) and "bytes shorter" in str(error)


def test_a_folder_that_cannot_be_made(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    failing = Supervisor(EngineSettings(ServerArgs(device="cpu")))
    with pytest.raises(PortError, match="TMPDIR"):
        asyncio.run(failing.start())
    asyncio.run(failing.close())


@pytest.mark.parametrize("taken", ["0.unit", "0.0.ipc", None])
def test_a_file_that_cannot_be_made(tmp_path, monkeypatch, taken):
    folder = tmp_path / "sockets"
    if taken is not None:
        (folder / taken / "full").mkdir(parents=True)
        folder.chmod(0o700)
    monkeypatch.setattr(supervisor, "make_folder", lambda: folder)
    error = asyncio.run(refused())
    assert isinstance(error, PortError) and "TMPDIR" in str(error) and str(folder) in str(error)


SCRIPTS = {
    "exit 7": ("exit 7", "exit code 7"),
    "killed": ("kill -9 $$", "SIGKILL"),
    "crashed": ("kill -SEGV $$", "SIGSEGV"),
    "without a word": ("exec sleep 60", "hung"),
    "not a program": (None, "cannot be started"),
}


@pytest.mark.parametrize(("script", "says"), SCRIPTS.values(), ids=SCRIPTS)
@pytest.mark.parametrize("num_devices", [1, 2])
def test_an_interpreter_that_is_none(folder, monkeypatch, script, says, num_devices):
    interpreter = folder / "python"
    if script is not None:
        interpreter.write_text(f"#!/bin/sh\n{script}\n")
        interpreter.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(interpreter))
    monkeypatch.setattr(group, "BEGIN_SECONDS", 1.0)
    begun = time.monotonic()
    if num_devices == 1:
        error = asyncio.run(refused())
    else:
        with pytest.raises(SafelightError) as caught:
            DiffusionGenerator.from_pretrained(device="cpu", devices=num_devices)
        error = caught.value
    assert isinstance(error, WorkerStartError) and says in str(error)
    assert time.monotonic() < begun + SOON


IMPORTS = {
    "a library of the system's is missing": ("raise ImportError('libx.so.1: cannot open')", "libx.so.1"),
    "a package is missing": ("import no_such_package", "no_such_package"),
    "a package is broken": ("raise AttributeError('no such name')", "no such name"),
    "it exits": ("raise SystemExit(9)", "exit code 9"),
    "it dies": ("import os; os._exit(11)", "exit code 11"),
    "it is killed": ("import os; os.kill(os.getpid(), 9)", "SIGKILL"),
    "it crashes": ("import os; os.kill(os.getpid(), 11)", "SIGSEGV"),
}


@pytest.mark.parametrize(("code", "says"), IMPORTS.values(), ids=IMPORTS)
def test_a_worker_that_fails_at_its_imports_ends_the_server(tmp_path, code, says):
    """The server itself imports no torch; its worker does, first of all."""
    (tmp_path / "torch.py").write_text(f"{code}\n")
    begun = time.monotonic()
    ended = subprocess.run(
        command("serve", "--port", str(free_port()), "--state-dir", str(tmp_path / "state")),
        capture_output=True,
        text=True,
        timeout=60,
        env={**environment(), "PYTHONPATH": str(tmp_path), "TMPDIR": str(tmp_path)},
        stdin=subprocess.DEVNULL,
    )
    assert time.monotonic() < begun + 2 * SOON  # two interpreters start in it
    assert ended.returncode == 3, ended.stderr
    last = ended.stderr.splitlines()[-1]
    assert last.startswith("safelight: ") and says in last, ended.stderr
    assert not list(tmp_path.glob("safelight-*"))


PACKAGES = {
    "serve": ["fastapi", "zmq", "diffusers"],
    "generate": ["torch", "PIL"],
}


@pytest.mark.parametrize(("name", "package"), [(name, each) for name, found in PACKAGES.items() for each in found])
def test_a_package_that_is_missing_is_named(tmp_path, name, package):
    """In the server's own process, in its worker as it loads, and in a command."""
    (tmp_path / f"{package}.py").write_text(
        f"raise ModuleNotFoundError('No module named {package}', name='{package}')\n"
    )
    arguments = ["serve", "--port", str(free_port()), "--state-dir", str(tmp_path / "state")]
    ended = subprocess.run(
        command(*(arguments if name == "serve" else ["generate", "a cat", "-o", str(tmp_path / "a.png")])),
        capture_output=True,
        text=True,
        timeout=60,
        env={**environment(), "PYTHONPATH": str(tmp_path)},
        stdin=subprocess.DEVNULL,
    )
    assert ended.returncode in (1, 3), ended.stderr
    last = ended.stderr.splitlines()[-1]
    assert last.startswith("safelight: ") and f"No module named {package}" in last, ended.stderr
    assert "internal error" not in last


def test_a_worker_that_cannot_be_started_again_ends_the_server(fault_family, fault_folder, folder, monkeypatch):
    monkeypatch.setattr(supervisor, "AGAIN_SECONDS", 0.05)

    async def test():
        async with running(fault_folder(name="served")) as running_one:
            pid = await pid_of(running_one)
            monkeypatch.setattr(sys, "executable", str(folder / "none"))
            waiting = [ask(running_one, f"[sleep@denoising:1=30] {index}", f"r{index}") for index in range(2)]
            os.kill(pid, signal.SIGKILL)
            await asyncio.wait_for(running_one.gave_up.wait(), SOON)
            for ticket in waiting:
                with contextlib.suppress(SafelightError):
                    await answer(ticket)
                assert ticket.done
            assert running_one.state == "failed"

    drive(test())


def replace_by(what, folder, elsewhere):
    """Take a folder of sockets away, as whoever cleans temporary files does, and put something else in its place."""
    shutil.rmtree(folder)
    if what == "a file":
        folder.touch()
    elif what == "a link":
        elsewhere.mkdir(mode=0o700)
        folder.symlink_to(elsewhere)
    elif what == "a folder for all":
        folder.mkdir()
        folder.chmod(0o777)
    elif what == "another user's":
        folder.mkdir(mode=0o700)
        os.chown(folder, 12345, 12345)


@pytest.mark.parametrize(
    "what",
    [
        "a link",
        *(
            pytest.param(each, marks=pytest.mark.slow)
            for each in ("nothing", "a file", "a folder for all", "another user's")
        ),
    ],
)
def test_a_folder_of_sockets_that_is_taken_away_ends_the_server(fault_family, fault_folder, folder, tmp_path, what):
    """No socket is made where others could use it. Each failed start is one death."""
    if what.startswith("another") and os.getuid() != 0:
        pytest.skip("giving a folder away takes root")

    async def test():
        failing = Supervisor(EngineSettings(ServerArgs(str(fault_folder(name="served")), device="cpu"), warm_up=False))
        await asyncio.wait_for(failing.start(), 60)
        sockets_folder, pid = failing._folder, await pid_of(failing)
        replace_by(what, sockets_folder, tmp_path / "elsewhere")
        os.kill(pid, signal.SIGKILL)
        await asyncio.wait_for(failing.gave_up.wait(), 2 * SOON)
        assert failing.state == "failed" and failing.stats.num_restarts == supervisor.MAX_DEATHS - 1
        if what != "nothing":
            assert sockets_folder.is_file() or not list(sockets_folder.iterdir())
        await failing.close()
        if os.path.lexists(sockets_folder):
            sockets_folder.unlink()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(supervisor, "AGAIN_SECONDS", 0.05)
        drive(test())


def test_what_no_one_thought_of_is_an_answer_too(folder, monkeypatch):
    async def broken(*_):
        raise ZeroDivisionError

    monkeypatch.setattr(supervisor, "start_worker", broken)
    assert isinstance(asyncio.run(refused()), WorkerStartError)


@pytest.mark.parametrize("broken", ["start_worker", "_lose"])
def test_what_no_one_thought_of_ends_a_server_that_ran(fault_family, fault_folder, folder, monkeypatch, broken):
    """Each of these starts is a death; where not even that can be counted, there is no other. The set is told."""

    async def fail(*_):
        raise ZeroDivisionError

    def fail_at_once(*_):
        raise ZeroDivisionError

    async def test():
        args = ServerArgs(str(fault_folder(name="served")), device="cpu")
        replicas = ReplicaSet(EngineSettings(args, warm_up=False), 1)
        await replicas.start()
        try:
            (only,) = replicas.replicas
            if broken == "_lose":
                monkeypatch.setattr(only, "_lose", fail_at_once)
            else:
                monkeypatch.setattr(supervisor, "start_worker", fail)
            os.kill(await pid_of(only), signal.SIGKILL)
            await asyncio.wait_for(replicas.gave_up.wait(), SOON)
            assert replicas.state == "failed"
        finally:
            await replicas.close()

    monkeypatch.setattr(supervisor, "AGAIN_SECONDS", 0.05)
    drive(test())


def test_a_server_with_a_long_temporary_folder_serves(tmp_path):
    long = tmp_path / ("long" * 40)
    long.mkdir()
    model = fault_model(tmp_path / "model")
    with serving(long, model) as server, server.http() as http:
        assert generate(http).status_code == 200


@pytest.mark.parametrize(
    ("warm_up", "refused", "is_warm"),
    [(True, False, True), pytest.param(False, False, False, marks=pytest.mark.slow), (True, True, False)],
)
def test_a_server_is_warm_only_if_a_request_was_run(
    fault_family, fault_folder, tmp_path, monkeypatch, warm_up, refused, is_warm
):
    """A model that no small request fits logs that there was none."""
    if refused:
        (tmp_path / "site").mkdir()
        (tmp_path / "site" / "sitecustomize.py").write_text(NO_SMALL_REQUEST)
        monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'site'}:{os.environ['PYTHONPATH']}")

    async def test():
        async with running(fault_folder(name="served"), warm_up=warm_up) as supervisor:
            assert supervisor.stats.load_seconds > 0
            assert bool(supervisor.stats.warm_up_seconds) is is_warm
            await answer(ask(supervisor))

    drive(test())


NO_SMALL_REQUEST = """
from safelight import preparation
from safelight.errors import UsageError

def none(schema):
    raise UsageError("no small request fits")

preparation.warm_up_params = none
"""
