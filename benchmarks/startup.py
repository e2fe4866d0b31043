"""How long `safelight --help` takes, from nothing to its end, and that it imports no torch."""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.common import begin, print_table

TARGET_MS = 300.0
TIMEOUT = 120.0


def commands() -> dict[str, list[str]]:
    """Return the commands to time; the scripts are those beside this Python."""
    scripts = Path(sys.executable).parent
    return {
        "python -c pass": [sys.executable, "-c", "pass"],
        "diffusers-cli --help": [str(scripts / "diffusers-cli"), "--help"],
        "safelight --help": [str(scripts / "safelight"), "--help"],
    }


def wall_seconds(command: Sequence[str]) -> float:
    """Run a command to its end and return the seconds on the wall."""
    begun = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=TIMEOUT)
    return time.perf_counter() - begun


def imports_torch(command: Sequence[str]) -> bool:
    """Say whether a Python script imports torch."""
    arguments = [sys.executable, "-X", "importtime", *command]
    child = subprocess.run(arguments, check=True, capture_output=True, text=True, timeout=TIMEOUT)
    return any(line.rpartition("|")[2].strip() == "torch" for line in child.stderr.splitlines())


def main() -> None:
    """Time every command in turn, forward and backward."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="rounds; each runs every command twice")
    arguments = begin(parser)
    timed = commands()
    samples: dict[str, list[float]] = {name: [] for name in timed}
    for command in timed.values():
        wall_seconds(command)
    for _ in range(1 if arguments.quick else arguments.rounds):
        for name in (*timed, *reversed(timed)):
            samples[name].append(wall_seconds(timed[name]))
    rows = []
    for name, command in timed.items():
        torch_imported = "yes" if command[0] != sys.executable and imports_torch(command) else "no"
        rows.append([name, f"{statistics.median(samples[name]) * 1000:.0f} ms", torch_imported])
    print(f"wall time, median; at most {TARGET_MS:.0f} ms is wanted")
    print_table(["command", "wall time", "imports torch"], rows)


if __name__ == "__main__":
    main()
