"""What a user saves on a disk that fails: a whole file, or none and a clear error."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.serving.failing_disk import ERRORS, FailingDisk

WRITES = ("write", "sync", "truncate", "rename")
FORMS = ("a.png", "a.jpg", "a.webp", "v.mp4", "v.webp", "v", "copy.mp4")
CHILD = """
import os, pathlib, sys
import numpy as np
from PIL import Image
from safelight import media, video
from safelight.errors import OutputError
from tests.serving.failing_disk import FOREVER, FailingDisk

folder = pathlib.Path(os.environ["FAILING_DISK_FOLDER"])
form, error, most = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
disk = FailingDisk.of_this_process()
random = np.random.default_rng(0)
pixels, frames = random.integers(0, 256, (300, 400, 3), np.uint8), random.integers(0, 256, (9, 64, 96, 3), np.uint8)
path = folder / form
data = b"a file as it is" * 100_000

def save():
    if form.startswith("copy"):
        video.save_file(data, path)
    elif form.startswith("v"):
        video.save_video(frames, path, 8, {"prompt": "x"})
    else:
        media.save_image(Image.fromarray(pixels), path, {"prompt": "x"})

def is_whole(path):
    if path.is_dir():
        assert len(list(path.iterdir())) == len(frames), path
        return all(is_whole(each) for each in path.iterdir())
    if form.startswith("copy"):
        return path.read_bytes() == data
    if path.suffix == ".mp4":
        return np.shape(video.read_frames(path.read_bytes())) == frames.shape
    with Image.open(path) as image:
        count = getattr(image, "n_frames", 1)
        for index in range(count):
            image.seek(index)
            image.load()
        return count == (len(frames) if form == "v.webp" else 1)

def clear():
    for each in sorted(folder.rglob("*"), reverse=True):
        each.rmdir() if each.is_dir() else each.unlink()

save()  # what is imported and opened once
clear()
operations = tuple(sys.argv[4].split("+"))
disk.count(operations)
save()
calls = disk.heal()
clear()
failed = 0
for after in range(0, calls + 1, max(1, calls // most)):
    for count in (1, FOREVER):
        disk.fail(operations, error, after, count)
        try:
            save()
        except OutputError as refusal:
            failed += 1
            assert "output: " in str(refusal) and len(str(refusal)) < 500, refusal
            disk.heal()
            assert not path.exists(), (after, count)
        else:
            disk.heal()
            assert is_whole(path), (after, count)
        left = [each.name for each in folder.iterdir() if each != path]
        assert not left, (after, count, left)
        clear()
print(calls, failed)
"""


def sweep(tmp_path, form, error, most):
    disk = FailingDisk(tmp_path / "disk", tmp_path / "shim")
    arguments = [form, str(ERRORS[error]), str(most), "+".join(WRITES)]
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *arguments], env=disk.environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    calls, failed = map(int, done.stdout.split())
    assert calls >= 3 and (failed >= 3 or error == "short")


@pytest.mark.parametrize("form", ["a.png", pytest.param("v.mp4", marks=pytest.mark.slow)])
def test_a_file_is_whole_or_not_there(tmp_path, form):
    sweep(tmp_path, form, "ENOSPC", 8)


@pytest.mark.slow
@pytest.mark.parametrize("error", list(ERRORS))
@pytest.mark.parametrize("form", FORMS)
def test_a_file_is_whole_or_not_there_wherever_the_disk_fails(tmp_path, form, error):
    sweep(tmp_path, form, error, 10_000)


@pytest.mark.slow
@pytest.mark.parametrize("error", ["ENOSPC", "EIO"])
def test_the_command_line_says_it_in_a_line(tmp_path, error):
    disk = FailingDisk(tmp_path / "disk", tmp_path / "shim")
    disk.fail(("write",), ERRORS[error])
    output = tmp_path / "disk" / "made.png"
    command = [sys.executable, "-P", "-m", "safelight.cli.main", "generate", "a red circle", "-o", str(output)]
    done = subprocess.run(
        [*command, "--num-inference-steps", "1"], env=disk.environment, capture_output=True, text=True, timeout=300
    )
    disk.heal()
    assert done.returncode == 2 and "output:" in done.stderr.splitlines()[-1], done.stderr
    assert list((tmp_path / "disk").iterdir()) == []
