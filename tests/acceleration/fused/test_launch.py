"""What the Triton kernels compute, without a GPU: in Triton's interpreter."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    (platform.system(), platform.machine()) != ("Linux", "x86_64"), reason="Triton has no build for this machine"
)
SUITE = Path(__file__).with_name("kernels_in_interpreter.py")


def test_kernels_in_the_interpreter():
    """In a process of its own: Triton is asked for its interpreter before it is imported."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(SUITE)]
    suite = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=900
    )
    assert suite.returncode == 0, suite.stdout + suite.stderr
    assert " passed" in suite.stdout and "skipped" not in suite.stdout
