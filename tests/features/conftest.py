"""Checkpoints, the pictures with everything off, and the page that the tests write."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from safelight.acceleration.compile import CACHE_VARIABLE
from tests.features import runs
from tests.features.report import markdown
from tests.parallel.conftest import pools

__all__ = ["pools"]

MEASURED = pytest.StashKey[dict[tuple[str, str], float]]()


def pytest_addoption(parser):
    parser.addoption("--features-report", type=Path, help="write the table of the features to this file")


def pytest_terminal_summary(terminalreporter, config):
    measured, target = config.stash.get(MEASURED, {}), config.getoption("--features-report", None)
    if measured and target:
        target.write_text(markdown(measured, tuple(runs.ASKED)))


@pytest.fixture(scope="session")
def measured(pytestconfig):
    """Return the largest difference of each pair in each family so far, by their names."""
    return pytestconfig.stash.setdefault(MEASURED, {})


@pytest.fixture(scope="session", autouse=True)
def inductor_cache(tmp_path_factory):
    """Keep what is compiled out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CACHE_VARIABLE, str(tmp_path_factory.mktemp("inductor")))
        yield


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory):
    """Return the checkpoint of a pipeline."""
    return cache(lambda name: runs.build(name, tmp_path_factory.mktemp("features") / name))


@pytest.fixture(scope="session")
def pictures_of(folder_of):
    """Return what a pipeline makes with everything off, on the CPU."""
    return cache(lambda name: runs.run(runs.load(folder_of(name), None), name, "alone").outputs)
