"""Pictures are tried: large ones in a process of their own."""

from __future__ import annotations

import subprocess
import sys

import pytest

from safelight.errors import InvalidParameterError
from safelight.serving import trial
from safelight.serving.input_pictures import open_picture
from safelight.serving.limits import Limits
from tests.serving.greedy_clients import chunk, picture_of
from tests.serving.large_bodies import KINDS

LIMITS = Limits()


CHECK = """
import resource, sys
from safelight.serving.limits import Limits
from safelight.serving.input_pictures import open_picture
from safelight.serving import trial
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
file = open(sys.argv[1], "rb").read()
image = open_picture(file, "image", Limits())
before = peak()
trial.check_all([("image", image.converted("RGB"))])
print(peak() - before)
"""


@pytest.mark.parametrize("kind", ["25 megapixels of PNG", "25 megapixels of JPEG", "25 megapixels of WebP"])
@pytest.mark.slow
def test_large_pictures_are_tried_elsewhere(kind, tmp_path):
    body = KINDS[kind]()[1]
    path = tmp_path / "picture"
    path.write_bytes(body.rpartition(b'filename="a"\r\n\r\n')[2].removesuffix(b"\r\n--b--\r\n"))
    done = subprocess.run(
        [sys.executable, "-c", CHECK, str(path)], capture_output=True, text=True, check=True, timeout=100
    )
    assert int(done.stdout) < 40 * 1024


def test_large_pictures_whole_and_damaged():
    whole = picture_of(2000, 1500)
    at = whole.index(b"IDAT")
    length = int.from_bytes(whole[at - 4 : at])
    assert trial.SMALL_PIXELS < 2000 * 1500
    good = open_picture(whole, "image", LIMITS).converted("RGB")
    trial.check_all([("image", good)] * 2)
    for kept in (0, length // 2, length - 5):
        cut = whole[: at - 4] + chunk(b"IDAT", whole[at + 4 :][:kept]) + chunk(b"IEND", b"")
        bad = open_picture(cut, "image", LIMITS)
        with pytest.raises(InvalidParameterError, match=r"images: got .a damaged PNG"):
            trial.check_all([("image", good), ("images", bad)])


@pytest.mark.parametrize("what", ["import os; os.abort()", "pass", "import time; time.sleep(60)"])
def test_whatever_happens_to_who_tries_a_picture_the_picture_is_damaged(what, monkeypatch):
    """A decoder that is overrun ends its own process; one that never ends is ended."""
    monkeypatch.setattr(trial, "python_command", lambda module: [sys.executable, "-c", what])
    monkeypatch.setattr(trial, "_SECONDS", 1.0)
    image = open_picture(picture_of(2000, 1500), "image", LIMITS)
    with pytest.raises(InvalidParameterError, match="damaged PNG"):
        trial.check_all([("image", image)])
