"""Attacks on a live server: `make test-attacks`, or `python -m tests.reliability.attacks [--only NAME ...]`.

The server is the real one, on a model whose steps are sleeps. A row an attack: how long `/livez` takes meanwhile, what
memory the API takes, whether another client is served, and whether all is as before when it is over. A row that misses
a bound is named, and the command ends with 1.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import platform
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.live_server import fault_model, serving
from tests.reliability.attack_processes import ATTACKS, BETWEEN
from tests.reliability.attack_rows import MOST_BYTES, MOST_HELPER_BYTES, MOST_SECONDS, Range, Row
from tests.reliability.attacker import NICE

SECONDS = 6.0
STEP_SECONDS = 0.005
BEGIN, END = "<!-- the table of make test-attacks -->\n", "<!-- its end -->\n"
HEADING = (
    "| attack | p50 | p99 | its own | longest | API over rest | kept | helpers | worker over rest | another client |\n"
    "|---|---:|---:|---:|---:|---:|---:|---:|---:|---|\n"
)


@contextlib.contextmanager
def attacked() -> Iterator[Range]:
    """Run a server to be attacked."""
    with tempfile.TemporaryDirectory(prefix="safelight-attacks-") as name:
        folder = Path(name)
        with serving(folder, fault_model(folder / "model", step_seconds=STEP_SECONDS)) as server:
            yield Range(server)


def rows(names: Sequence[str], seconds: float, is_busy: bool = False) -> Iterator[Row]:
    """Yield a row for each attack, all on one server; after a row that misses something another one is started.

    Args:
        names: of the attacks.
        seconds: of each.
        is_busy: whether the machine is, as `judged` has it.

    """
    left = list(names)
    while left:
        row = None
        try:
            with attacked() as here:
                while left and (row is None or not row.faults):
                    row = here.measure(left[0], seconds, is_busy=is_busy)
                    left.pop(0)
                    if not row.faults:
                        yield row
        except AssertionError as error:  # it did not end as servers do
            row = row or Row(left.pop(0), "")
            row.faults.append(" ".join(str(error).split())[-300:])
        if row is not None and row.faults:
            yield row


def line(row: Row) -> str:
    """Return a row of the table, whose missed bounds are marked."""

    def marked(text: str, missed: bool) -> str:
        return f"**{text}**" if missed else text

    waits = sorted(seconds for status, seconds in row.visits if status == "200")
    visitor = f"{row.served} of {len(row.visits)}"
    if waits:
        visitor += f", {1000 * waits[len(waits) // 2]:.0f} ms"
    cells = (
        marked(row.says, bool(row.faults)),
        f"{1000 * row.median:.1f}",
        marked(f"{1000 * row.p99:.1f}", row.p99 > MOST_SECONDS),
        f"{1000 * row.own:.1f}",
        f"{1000 * row.longest:.0f}",
        marked(f"{row.api / 1e6:.0f}", row.api > MOST_BYTES),
        f"{row.left / 1e6:.0f}",
        marked(f"{row.helpers / 1e6:.0f}", row.helpers > MOST_HELPER_BYTES),
        f"{row.worker / 1e6:.0f}",
        marked(visitor, row.served < len(row.visits)),
    )
    return f"| {' | '.join(cells)} |\n"


def machine() -> str:
    """Say what it was measured on."""
    info = Path("/proc/cpuinfo").read_text()
    name = re.search(r"model name\s*: (.*)", info)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    cores = len(os.sched_getaffinity(0))
    return (
        f"{cores} cores of {name[1] if name else platform.machine()}, {memory / 1e9:.0f} GB, "
        f"{platform.system()} {platform.release().partition('-')[0]}, Python {platform.python_version()}"
    )


def table(found: Sequence[Row], seconds: float) -> str:
    """Return the section."""
    late = max((row.late for row in found), default=0.0)
    about = (
        f"Measured on {machine()}; each attack for {seconds:g} s (some for twice that), by a process at nice {NICE}. "
        f"Times in milliseconds, memory in MB. The machine kept whoever asked, each {1000 * BETWEEN:g} ms, from asking "
        f"for {1000 * late:.1f} ms at most (99th percentile, worst row).\n\n"
    )
    return about + HEADING + "".join(map(line, found))


def rewritten(text: str, section: str) -> str:
    """Return a document with the section in its place, between two comments; all else is as it was."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit("the document has no place for the table")
    return f"{before}{BEGIN}\n{section}\n{END}{after}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Attack a server; return 1 if any row missed anything."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=list(ATTACKS), metavar="NAME", help=f"of {', '.join(ATTACKS)}")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of each attack (default: %(default)s)")
    parser.add_argument("--write", type=Path, help="the document whose table is replaced")
    parser.add_argument("--json", type=Path, help="a file for all that was measured")
    parser.add_argument(
        "--busy", action="store_true", help="judge /livez without what the kernel gave to others: not for a table"
    )
    args = parser.parse_args(arguments)
    if args.write and (args.only or args.busy):
        parser.error("--write takes the table of all attacks, on a machine that is not busy")
    found = []
    print(HEADING, end="", flush=True)
    for row in rows(args.only or list(ATTACKS), args.seconds, args.busy):
        found.append(row)
        print(line(row), end="", flush=True)
        for fault in row.faults:
            print(f"{row.name}: {fault}", file=sys.stderr, flush=True)
    if args.json:
        args.json.write_text(json.dumps([dataclasses.asdict(row) for row in found], indent=1))
    if args.write:
        args.write.write_text(rewritten(args.write.read_text(encoding="utf-8"), table(found, args.seconds)))
    failed = [row.name for row in found if row.faults]
    print(
        f"{len(found)} attacks, {len(failed)} missed something: {', '.join(failed)}"
        if failed
        else f"{len(found)} attacks"
    )
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
