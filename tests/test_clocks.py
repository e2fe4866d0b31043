"""The clock that can be set makes stamps for people, and nothing else: no duration, no age, no order."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "safelight"
STAMPS = {
    (
        "serving/clocks.py",
        "time.time",
    ): "the stamps of jobs, and what `Expiry` compares with the clock that nobody sets",
    ("serving/context.py", "time.time"): "`created` of the served model",
    ("serving/images_api.py", "time.time"): "`created` of an answer",
    ("loading/files.py", "st_mtime_ns"): "whether a file is another one: compared for sameness, never for age",
}
"""Where a clock for people is read, and for what."""
CALENDAR = {"time", "time_ns", "localtime", "gmtime", "ctime", "asctime", "strftime", "CLOCK_REALTIME"}
HARMLESS = {"monotonic", "perf_counter", "sleep", "timedelta"}
OTHERS = {"st_mtime", "st_mtime_ns", "st_ctime", "st_ctime_ns", "st_atime", "st_atime_ns", "st_birthtime"}
OTHERS |= {"getmtime", "getctime", "getatime"}
JOB_STAMPS = {"created_at", "started_at", "completed_at", "expires_at"}
DIFFERENCES = {
    (
        "serving/jobs/job.py",
        "self.expires_at - self.completed_at",
    ): "both made at once: `keep_seconds`",
    ("serving/jobs/expiry.py", "job.expires_at - steady"): "whether the clock was set since",
}
"""Where a job's stamps are computed with, and why."""
ORDER = (ast.Lt, ast.LtE, ast.Gt, ast.GtE)
NAMES = {path: str(path.relative_to(SOURCE)) for path in sorted(SOURCE.rglob("*.py"))}


def clocks_for_people(tree: ast.AST) -> set[str]:
    """Return what is read that a person, or the network, sets."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module in ("time", "datetime"):
            found |= {f"{node.module}.{alias.name}" for alias in node.names if alias.name not in HARMLESS}
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name == "datetime"}
        if isinstance(node, ast.Attribute):
            is_of_time = isinstance(node.value, ast.Name) and node.value.id == "time"
            if (is_of_time and node.attr in CALENDAR) or node.attr in OTHERS:
                found.add(f"time.{node.attr}" if is_of_time else node.attr)
    return found


def differences(tree: ast.AST) -> set[str]:
    """Return where a stamp of a job is added, subtracted or compared for order."""
    found = set()
    for node in ast.walk(tree):
        operands: list[ast.expr] = []
        if isinstance(node, ast.BinOp):
            operands = [node.left, node.right]
        elif isinstance(node, ast.Compare) and any(isinstance(each, ORDER) for each in node.ops):
            operands = [node.left, *node.comparators]
        if any(isinstance(each, ast.Attribute) and each.attr in JOB_STAMPS for each in operands):
            found.add(ast.unparse(node))
    return found


def test_clocks_for_people_are_read_where_people_read():
    found = {(NAMES[path], what) for path in NAMES for what in clocks_for_people(ast.parse(path.read_text()))}
    assert found == set(STAMPS)


def test_stamps_of_jobs_are_computed_with_nowhere_else():
    found = {(NAMES[path], what) for path in NAMES for what in differences(ast.parse(path.read_text()))}
    assert found == set(DIFFERENCES)


@pytest.mark.parametrize(
    "text",
    [
        *("import time\nx = time.time()", "from time import time", "import datetime", "from datetime import datetime"),
        *("x = clock or time.time_ns", "age = now - path.stat().st_mtime", "os.path.getmtime(p)"),
        "time.clock_gettime(time.CLOCK_REALTIME)",
    ],
)
def test_what_the_first_sees(text):
    assert clocks_for_people(ast.parse(text))


@pytest.mark.parametrize(
    "text",
    ["job.completed_at - job.created_at", "now > job.expires_at", "x = job.started_at + 1", "a - job.created_at"],
)
def test_what_the_second_sees(text):
    assert differences(ast.parse(text))
