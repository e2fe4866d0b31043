"""What all tests share."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import pytest
import torch

from tests.families.report import ParityRow, markdown, table

torch.set_num_threads(1)  # tiny models: threads would only wait for each other


def pytest_addoption(parser):
    parser.addoption("--parity-report", type=Path, help="write the table of the parity suite to this file")
    parser.addoption("--slow", action="store_true", help="run the slow tests as well")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--slow"):
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    if slow:
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]


def pytest_configure(config):
    config.stash[PARITY_ROWS] = []


PARITY_ROWS = pytest.StashKey[list[ParityRow]]()


@pytest.fixture
def parity_rows(request):
    """Rows of the table that the parity suite prints: (pipeline, case, what, largest difference)."""
    return request.config.stash[PARITY_ROWS]


def pytest_terminal_summary(terminalreporter, config):
    rows = config.stash[PARITY_ROWS]
    if not rows:
        return
    terminalreporter.section("parity with Diffusers: largest difference")
    terminalreporter.write_line(table(rows))
    if config.getoption("--parity-report"):
        config.getoption("--parity-report").write_text(markdown(rows))
