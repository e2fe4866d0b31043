"""Folders of sockets that killed servers left are removed by the next, and nobody else's."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from safelight.runtime.sockets import make_folder, remove_folder

KILLED = "import os; from safelight.runtime.sockets import make_folder; print(make_folder()); os.kill(os.getpid(), 9)"


@pytest.fixture
def parent(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def left(parent: Path, name: str = "safelight-abcd_123", mode: int = 0o700, files=("0.unit", "0.0.ipc")) -> Path:
    folder = parent / name
    folder.mkdir()
    for each in files:
        if each.endswith(".ipc"):
            with socket.socket(socket.AF_UNIX) as bound:
                bound.bind(str(folder / each))
        else:
            (folder / each).touch()
    folder.chmod(mode)
    return folder


def next_start() -> None:
    remove_folder(make_folder())


def test_what_a_killed_server_left_is_removed(parent):
    env = {**os.environ, "TMPDIR": str(parent)}
    ended = subprocess.run([sys.executable, "-c", KILLED], capture_output=True, text=True, env=env, timeout=60)
    folder = Path(ended.stdout.strip())
    assert folder.parent == parent and folder.is_dir()
    (folder / "0.unit").touch()
    (folder / "0123456789abcdef.frames").touch()
    older = left(parent)
    next_start()
    assert not folder.exists() and not older.exists() and not list(parent.iterdir())


@pytest.mark.parametrize(
    "details",
    [
        {"name": "safelight-notes"},
        {"name": "safelight-abcd_1234"},
        {"mode": 0o755},
        {"files": ("0.unit", "notes.txt")},
        {"files": ()},
    ],
    ids=str,
)
def test_what_is_not_ours_stays(parent, details):
    folder = left(parent, **details)
    next_start()
    assert folder.is_dir() and len(list(folder.iterdir())) == len(details.get("files", (1, 2)))


def test_what_is_held_stays(parent):
    held, killed = make_folder(), left(parent)
    (held / "0.unit").touch()
    next_start()
    assert (held / "0.unit").exists() and not killed.exists()
    remove_folder(held)


@pytest.mark.skipif(os.getuid() != 0, reason="giving a folder away takes root")
def test_what_another_user_owns_stays(parent):
    folder = left(parent)
    os.chown(folder, 12345, 12345)
    next_start()
    assert folder.is_dir()
    shutil.rmtree(folder)


def test_a_link_is_not_followed(parent, tmp_path):
    real = left(parent, name="elsewhere")
    (parent / "safelight-abcd_123").symlink_to(real)
    next_start()
    assert real.is_dir() and len(list(real.iterdir())) == 2
