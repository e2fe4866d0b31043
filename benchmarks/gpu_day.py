"""Everything that only a GPU can prove or measure, in one command of at most eight minutes.

Sections run in a fixed order, the most valuable first, each in processes of its own with a limit of time; what one
prints is shown at once, its verdict is written as a line of JSON, and a section that fails or takes too long does not
keep the next from running. First correctness: versions, kernels, attention, tiny models of every family beside
Diffusers on the same device, graphs, failures, offload, memory, decoding, compiled blocks, the server. Then speed, at
the published sizes, beside Diffusers, with the ceilings measured in the same run.

`make gpu-wheels` fetches the packages that a machine with torch, transformers and their like may lack. `--quick
--device cpu` runs the same sections on the CPU, tiny: it shows that they run, and what they print means nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from safelight.runtime.processes import SAFE_PATH
from safelight.runtime.supervisor.group import worker_environment

TESTS = (
    *(sys.executable, "-m", "pytest", "-q", "-W", "default", "--tb=short"),
    *("-p", "no:cacheprovider", "-p", "no:benchmark", "--disable-warnings"),
)
"""Warnings are no errors here: the machine's libraries may be others than those of the tests."""
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
"""Tiny models on a CPU only wait for more."""
TOTAL = 480.0
"""Seconds for everything; those of the sections are what they took on an H200, and some more."""
SHARE_OF_PLANNED = 1.5
"""Of its planned seconds, after which a section is ended."""


@dataclass(frozen=True)
class Section:
    """One part of the day.

    Attributes:
        name: for `--only`.
        command: what is run, with `{device}` where the device's name goes.
        seconds: that it should take on a GPU.
        quick: what is run on the CPU, to show that it runs; as `command` unless given.
        needs_gpu: whether the CPU has nothing to show for it.

    """

    name: str
    command: Sequence[str]
    seconds: float
    quick: Sequence[str] | None = None
    needs_gpu: bool = False


def tests(*arguments: str, workers: int) -> tuple[str, ...]:
    """Return the command of tests that are marked `cuda`."""
    return (*TESTS, "-m", "cuda", "--on-device", "{device}", "-n", str(workers), "--slow", "-rfE", *arguments)


def check(name: str) -> tuple[str, ...]:
    """Return the command of a function of `gpu_checks`."""
    return (sys.executable, "-m", "benchmarks.gpu_checks", name, "--device", "{device}")


def speed(family: str, *arguments: str) -> tuple[str, ...]:
    """Return the command of a family's benchmark."""
    return (sys.executable, "-m", "benchmarks.gpu", "--family", family, "--device", "{device}", *arguments)


TINY = ("--layers", "tiny", "--quick", "--skip-compile")
TESTED = (
    "tests/acceleration/fused/kernels_in_interpreter.py",
    "tests/acceleration/test_graphs.py",
    "tests/acceleration/test_on_device.py",
    "tests/families/test_on_device.py",
    "tests/features/test_features.py",
    "tests/runtime/worker/test_on_device.py",
)
"""Kernels; graphs; attention, offload, compiled blocks and memory; every pipeline; graphs with all else; failures."""
SECTIONS = (
    Section("environment", check("environment"), 12),
    Section("fusion", check("fusion"), 25, needs_gpu=True),
    Section("attention", check("attention"), 15),
    Section(
        "tests",
        tests(*TESTED, workers=12),
        95,
        tests(*TESTED[1:], "-k", "offload and Flux or FluxPipeline and float32", workers=1),
    ),
    Section("server", check("server"), 50),
    Section("flux", speed("flux", "--skip-compile", "--rounds", "2"), 40, speed("flux", *TINY)),
    Section("graphs", check("graphs"), 15, needs_gpu=True),
    Section("decode", check("decode"), 30),
    Section("offload", check("offload"), 20),
    Section("memory", check("memory"), 20, needs_gpu=True),
    Section("compile", check("compile"), 60),
    Section("wan", speed("wan", "--skip-compile", "--rounds", "1"), 40, speed("wan", *TINY)),
    Section("qwen", speed("qwen_image", "--skip-compile", "--rounds", "1"), 30, speed("qwen_image", *TINY)),
)


def run_section(section: Section, device: str, limit: float) -> dict[str, object]:
    """Run a section, showing what it prints as it prints it; return its verdict."""
    command = section.command if device == "cuda" or section.quick is None else section.quick
    command = [part.format(device=device) for part in command]
    begun, lines = time.monotonic(), []
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
        env=environment(device),
    )
    timer = threading.Timer(limit, end_group, [process])
    timer.start()
    assert process.stdout is not None
    with process.stdout as printed:
        for line in printed:
            if not line.startswith("USDT:"):  # of torch's profiler
                lines.append(line.rstrip())
                print(f"  {lines[-1]}", flush=True)
    code = process.wait()
    late = not timer.is_alive()
    timer.cancel()
    end_group(process)
    status = "passed" if code == 0 else "too late" if late else "failed"
    return {
        "section": section.name,
        "status": status,
        "exit": code,
        "seconds": round(time.monotonic() - begun, 1),
        "output": lines,
    }


def environment(device: str) -> dict[str, str]:
    """Return the environment of a section: a worker's, but that the benchmarks lie in the working directory."""
    known = {**worker_environment(), "PYTHONUNBUFFERED": "1", **(ONE_THREAD if device == "cpu" else {})}
    del known[SAFE_PATH]
    return known


def end_group(process: subprocess.Popen[str]) -> None:
    """End a section's process and all that it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def chosen(only: str | None) -> list[Section]:
    """Return the sections that were asked for, in their order."""
    known = [section.name for section in SECTIONS]
    names = known if only is None else only.split(",")
    for name in names:
        if name not in known:
            raise SystemExit(f"--only: there is no section {name!r}; there are {', '.join(known)}")
    return [section for section in SECTIONS if section.name in names]


def main() -> int:
    """Run the sections; return 1 if one has failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="sections, with commas between")
    parser.add_argument("--quick", action="store_true", help="tiny, to see that it runs; needs --device cpu")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--seconds", type=float, default=TOTAL, help="for everything  [default: %(default)s]")
    parser.add_argument("--out", type=Path, default=Path("outputs/gpu_day.jsonl"), help="lines of JSON")
    arguments = parser.parse_args()
    if arguments.quick != (arguments.device == "cpu"):
        parser.error("--quick and --device cpu go together: on the CPU the published sizes would take days")
    sections, deadline = chosen(arguments.only), time.monotonic() + arguments.seconds
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    verdicts = []
    with arguments.out.open("w", encoding="utf-8") as out:
        for section in sections:
            verdict = verdict_of(section, arguments.device, deadline - time.monotonic())
            out.write(json.dumps(verdict) + "\n")
            out.flush()
            verdicts.append(verdict)
            print(f"== {section.name}: {verdict['status']}, {verdict['seconds']} s", flush=True)
    print("\n" + ", ".join(f"{verdict['section']}: {verdict['status']}" for verdict in verdicts))
    return int(any(verdict["status"] in ("failed", "too late", "left out") for verdict in verdicts))


def verdict_of(section: Section, device: str, seconds_left: float) -> dict[str, object]:
    """Run a section where it can be, and return what became of it."""
    left_out: dict[str, object] = {"section": section.name, "exit": None, "seconds": 0.0, "output": []}
    if section.needs_gpu and device == "cpu":
        return {**left_out, "status": "needs a GPU"}
    if seconds_left < section.seconds / 2:
        return {**left_out, "status": "left out"}
    print(f"\n== {section.name}", flush=True)
    return run_section(section, device, min(SHARE_OF_PLANNED * section.seconds, seconds_left))


if __name__ == "__main__":
    sys.exit(main())
