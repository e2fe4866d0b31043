"""The file that says what a worker does: on a full disk it is refused, and ends nobody by a signal."""

from __future__ import annotations

import subprocess
import sys

from tests.serving.disks import fill, small_disk

LOOK = """
import pathlib, sys
from safelight.errors import PortError
from safelight.runtime.unit_board import Unit, UnitBoard
try:
    board = UnitBoard(pathlib.Path(sys.argv[1]) / "0.unit")
except PortError as error:
    print(error)
else:
    board.write(Unit("denoising", ("x",), 1.0, 2.0))
    print(board.read())
"""


def test_on_a_full_disk(tmp_path):
    def look(folder):
        done = subprocess.run([sys.executable, "-c", LOOK, str(folder)], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, (done.returncode, done.stderr[-500:])
        return done.stdout

    with small_disk(tmp_path / "disk", "64k") as disk:
        assert "denoising" in look(disk)
        (disk / "0.unit").unlink()
        filling = fill(disk)
        assert "TMPDIR" in look(disk) and "No space" in look(disk)
        filling.unlink()
        assert "denoising" in look(disk)
