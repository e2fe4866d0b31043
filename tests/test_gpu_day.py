"""The command of a GPU's day: it goes on after failures, ends what takes too long, and tells what became of each."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest

from benchmarks import gpu_day
from benchmarks.gpu_day import SECTIONS, TESTED, Section

ROOT = Path(__file__).parents[1]


def section(name, code, **details):
    return Section(name, (sys.executable, "-c", code), details.pop("seconds", 30), **details)


def run(monkeypatch, tmp_path, sections, *arguments):
    out = tmp_path / "day.jsonl"
    monkeypatch.setattr(gpu_day, "SECTIONS", sections)
    monkeypatch.setattr(sys, "argv", ["gpu_day", "--quick", "--device", "cpu", "--out", str(out), *arguments])
    code = gpu_day.main()
    return code, [json.loads(line) for line in out.read_text().splitlines()]


def test_a_section_that_fails_keeps_no_other_from_running(monkeypatch, tmp_path, capsys):
    sections = [
        section("first", "print('one'); print('two')"),
        section("wrong", "print('half'); raise SystemExit(3)"),
        section("killed", "import os; os.abort()"),
        section("gpu's", "print('never')", needs_gpu=True),
        section("last", "import sys; print('on stderr', file=sys.stderr)"),
    ]
    code, verdicts = run(monkeypatch, tmp_path, sections)
    assert code == 1
    assert [verdict["status"] for verdict in verdicts] == ["passed", "failed", "failed", "needs a GPU", "passed"]
    assert verdicts[0]["output"] == ["one", "two"] and verdicts[1]["output"] == ["half"] and verdicts[1]["exit"] == 3
    assert verdicts[4]["output"] == ["on stderr"]
    assert "wrong: failed" in capsys.readouterr().out


def test_what_takes_too_long_is_ended_with_all_that_it_started(monkeypatch, tmp_path):
    """Also where a process that it started holds its output open."""
    child = "import subprocess, sys, time; print('begun', flush=True); "
    child += "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); time.sleep(600)"
    begun = time.monotonic()
    sections = [section("slow", child, seconds=1.0), section("next", "print('here')")]
    code, verdicts = run(monkeypatch, tmp_path, sections)
    assert code == 1 and time.monotonic() - begun < 60
    assert [verdict["status"] for verdict in verdicts] == ["too late", "passed"]


def test_what_has_no_time_left_is_named(monkeypatch, tmp_path):
    sections = [section("first", "print('here')", seconds=1.0), section("long", "print('never')", seconds=1000.0)]
    code, verdicts = run(monkeypatch, tmp_path, sections, "--seconds", "100")
    assert code == 1 and [verdict["status"] for verdict in verdicts] == ["passed", "left out"]


def test_sections_can_be_chosen_and_an_unknown_one_is_named(monkeypatch, tmp_path):
    sections = [section(name, "print('here')") for name in ("one", "two", "three")]
    code, verdicts = run(monkeypatch, tmp_path, sections, "--only", "three,one")
    assert code == 0 and [verdict["section"] for verdict in verdicts] == ["one", "three"]
    with pytest.raises(SystemExit, match="there is no section 'four'; there are one, two, three"):
        run(monkeypatch, tmp_path, sections, "--only", "one,four")


def test_everything_fits_into_eight_minutes_and_names_what_there_is():
    assert sum(section.seconds for section in SECTIONS) <= gpu_day.TOTAL
    assert len({section.name for section in SECTIONS}) == len(SECTIONS)
    for path in TESTED:
        assert (ROOT / path).is_file()
    marked = [path for path in (ROOT / "tests").rglob("*.py") if "mark.cuda" in path.read_text()]
    assert {str(path.relative_to(ROOT)) for path in marked} - {"tests/test_gpu_day.py"} <= set(TESTED)


def test_a_check_that_does_not_hold_ends_with_1(monkeypatch):
    from benchmarks import gpu_checks

    monkeypatch.setattr(sys, "argv", ["gpu_checks", "environment", "--device", "cpu"])
    assert gpu_checks.main() == 0
    monkeypatch.setattr(gpu_checks, "CHECKS", {"environment": lambda machine: False})
    assert gpu_checks.main() == 1


def test_a_section_finds_the_benchmarks_where_it_is_run(monkeypatch, tmp_path):
    """Workers look for nothing in the working directory; sections are modules of this one."""
    monkeypatch.chdir(ROOT)
    sections = [Section("module", (sys.executable, "-c", "import benchmarks.gpu_checks; print('found')"), 60)]
    code, verdicts = run(monkeypatch, tmp_path, sections)
    assert code == 0 and verdicts[0]["output"][-1] == "found"
