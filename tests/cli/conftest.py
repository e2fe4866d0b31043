"""The command line, run in this process."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from safelight.cli.main import main
from tests.loading.conftest import checkpoints as checkpoints

SMALL = ("--height", "16", "--width", "16", "--num-inference-steps", "1", "--max-sequence-length", "8")


@dataclass
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str


@pytest.fixture
def run(capfd):
    """Run a command line; standard output and error are those of the process."""

    def run(*args):
        with pytest.raises(SystemExit) as ended:
            main([str(arg) for arg in args])
        assert isinstance(ended.value.code, int)
        return Ended(ended.value.code, *capfd.readouterr())

    return run


@pytest.fixture
def generate(run, checkpoints):
    """Run `safelight generate` on a tiny model, at a size that takes no time unless told otherwise."""

    def generate(*args, variant="dev", small=True):
        return run("generate", "--model", checkpoints.folder(variant), *(SMALL if small else ()), *args)

    return generate
