"""What all tests share."""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import pytest
import torch

from safelight.core import registry
from tests import attribution

pytest_plugins = ("safelight.testing.plugin",)  # by the name of its entry point, which is not there until installed
attribution.attribute()
gc.disable()  # until all tests are imported, which stay
torch.set_num_threads(1)  # tiny models: threads would only wait for each other


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the slow tests as well")
    parser.addoption(
        "--on-device", help="where tests marked `cuda` run: cuda where there is one; cpu shows that they run at all"
    )


def pytest_collection_modifyitems(config, items):
    if not (torch.cuda.is_available() or config.getoption("--on-device")):
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="needs CUDA"))
    if config.getoption("--slow"):
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    if slow:
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session):
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def _exact_convolutions(request, monkeypatch):
    """Let convolutions in float32 be that: cuDNN's default rounds to ten bits, and shows every order of sums."""
    if request.node.get_closest_marker("cuda"):
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(scope="session")
def device(request):
    """Where a test marked `cuda` runs."""
    return torch.device(request.config.getoption("--on-device") or "cuda")


def pytest_terminal_summary(terminalreporter):
    reports = [report for key in ("passed", "failed") for report in terminalreporter.stats.get(key, ())]
    if any("test_layout.py::test_budgets" in report.nodeid for report in reports):
        from tests.budgets import all_budgets

        terminalreporter.section("budgets in code lines")
        for budget in all_budgets():
            terminalreporter.write_line(budget.line())


FAULT = Path(__file__).parent / "fault"


@pytest.fixture(scope="session")
def fault_path():
    """Make the package importable here; only `fault_family` registers it."""
    sys.path.insert(0, str(FAULT))
    yield
    sys.path.remove(str(FAULT))


@pytest.fixture(scope="module")
def fault_family(fault_path):
    """Register the pipelines here and in processes that are started."""
    registry.pipelines()
    from safelight_fault import register

    registry._entries.update({**registry._entries, **registered(register)})
    known = {name: entry for name, entry in registry._entries.items() if entry.model_family != "fault"}
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = str(FAULT) if before is None else f"{FAULT}:{before}"
    yield
    registry._entries.clear()
    registry._entries.update(known)
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before


_registered: dict[str, registry.PipelineEntry] = {}


def registered(module) -> dict[str, registry.PipelineEntry]:
    """Return what the module registered when it was first imported."""
    if not _registered:
        _registered.update({n: e for n, e in registry._entries.items() if e.model_family == "fault"})
    return _registered
