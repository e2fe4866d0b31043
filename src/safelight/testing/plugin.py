"""pytest's plugin: the fixtures and the report of the suites. Nothing of torch is imported until a suite runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from safelight.testing.report import OTHERWISE_HEADINGS, OtherwiseRow, ParityRow, markdown, table

if TYPE_CHECKING:
    from safelight.testing.models import TinyModels

pytest.register_assert_rewrite("safelight.testing.suites", "safelight.testing.models", "safelight.testing.reference")

PARITY_ROWS = pytest.StashKey[list[ParityRow]]()
OTHERWISE_ROWS = pytest.StashKey[list[OtherwiseRow]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option of the report."""
    group = parser.getgroup("safelight")
    group.addoption("--parity-report", type=Path, help="write the table of Safelight's parity suite to this file")


def pytest_configure(config: pytest.Config) -> None:
    """Make room for the report's rows, and name the mark of slow cases."""
    config.addinivalue_line("markers", "slow: takes long")
    config.stash[PARITY_ROWS] = []
    config.stash[OTHERWISE_ROWS] = []


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> TinyModels:
    """Tiny checkpoints and the models loaded from them, each made once a session."""
    import torch

    from safelight.testing.models import TinyModels

    torch.manual_seed(0)
    return TinyModels(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture
def parity_rows(pytestconfig: pytest.Config) -> list[ParityRow]:
    """Rows of the table that the parity suite prints: one a case, of the largest differences."""
    return pytestconfig.stash[PARITY_ROWS]


@pytest.fixture
def otherwise_rows(pytestconfig: pytest.Config) -> list[OtherwiseRow]:
    """Rows of the table of what the installed reference does otherwise than the models' authors."""
    return pytestconfig.stash[OTHERWISE_ROWS]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print what the parity suite found."""
    rows, otherwise = config.stash[PARITY_ROWS], config.stash[OTHERWISE_ROWS]
    if otherwise:
        terminalreporter.section("where the installed Diffusers errs: difference from the models' authors, and ours")
        terminalreporter.write_line(table(otherwise, OTHERWISE_HEADINGS))
    if not rows:
        return
    terminalreporter.section("parity with Diffusers: largest difference")
    terminalreporter.write_line(table(rows))
    report: Path | None = config.getoption("--parity-report")
    if report is not None:
        report.write_text(markdown(rows, otherwise))
