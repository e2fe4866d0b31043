"""Each example runs as it stands, and writes the files that it names."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.live_server import environment, serving

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("server"), None) as server:
        yield server


def run(script, folder, *arguments):
    """Run an example in a folder; return what it prints."""
    interpreter = ["sh"] if script.suffix == ".sh" else [sys.executable]
    ended = subprocess.run(
        [*interpreter, str(script), *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        env=environment(),
    )
    assert ended.returncode == 0, ended.stderr
    files = [line for line in ended.stdout.split() if line.endswith(".png")]
    assert files
    for name in files:
        with Image.open(folder / name) as picture:
            assert picture.size == (128, 128)
    return ended.stdout


@pytest.mark.parametrize("script", sorted((EXAMPLES / "offline_inference").iterdir()), ids=lambda path: path.name)
def test_offline(script, tmp_path):
    run(script, tmp_path)


@pytest.mark.parametrize("script", sorted((EXAMPLES / "online_serving").iterdir()), ids=lambda path: path.name)
def test_online(script, tmp_path, server):
    run(script, tmp_path, server.url)
