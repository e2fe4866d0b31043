"""The page docs/pipelines.md: written from rows, and read again."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

from tests.pipelines.columns import BOUND, COLUMNS, YES

PAGE = Path(__file__).parents[2] / "docs" / "pipelines.md"
Row = Mapping[str, str]
"""By a column's name, `yes` or why not."""
HEAD = f"""# Pipelines of the diffusers package

Made by `make pipelines`; do not edit. Each row is a pipeline class, built tiny and random, saved, and run by the engine
on the CPU in float32; each cell is measured, and says yes or the number of the reason why not, below. A test measures
them again.

- **equal**: with three seeds and two unlike requests, the bytes of Diffusers alone.
- **n=2**: two outputs of one request are those of the two seeds, to the byte.
- **interleaved**: three requests, two of them unlike, take turns call by call; each gives its bytes.
- **cancelled**: closed after every number of units, of which none is longer than a step: no thread, output or tensor
  stays, and the next request gives its bytes.
- **moved**: a request that waits can leave the device.
- **compiled**: `compile=blocks`, within {BOUND:.0e}.
- **offload**: with the least memory that `offload=components` or `blocks` asks for, the same bytes; a second memory of
  the host stands for a device's.
- **cached**: an equal request takes its embeddings from the conditioning cache, and gives its bytes.
- **stacked**: with `batching="throughput"` calls of two requests are made as one, within {BOUND:.0e}.
- **devices**: two of them share a request, within {BOUND:.0e}: its guidance branches (`cfg_parallel_size=2`), or its
  tokens (`ulysses_degree=2`).
- **saved**: what it makes is written to a file, and read again.
"""


def markdown(rows: Mapping[str, Row]) -> str:
    """Return the page of rows by the pipelines' names."""
    numbers: dict[str, int] = {}
    lines = []
    for name, row in rows.items():
        cells = [_cell(row[column.name], numbers) for column in COLUMNS]
        lines.append("| " + " | ".join([name.removesuffix("Pipeline"), *cells]) + " |")
    counts = [sum(row[column.name].startswith(YES) for row in rows.values()) for column in COLUMNS]
    heading = "| " + " | ".join(["pipeline", *(column.name for column in COLUMNS)]) + " |"
    total = "| " + " | ".join([f"of {len(rows)}", *map(str, counts)]) + " |"
    versions = ", ".join(f"{name} {version(name).split('+')[0]}" for name in ("diffusers", "transformers", "torch"))
    reasons = [f"{number}. {reason}" for reason, number in numbers.items()]
    table = [heading, "|" + " --- |" * (len(COLUMNS) + 1), *lines, total]
    return "\n".join([HEAD, f"{versions}.", "", *table, "", "Why not:", "", *reasons]) + "\n"


def _cell(outcome: str, numbers: dict[str, int]) -> str:
    if outcome.startswith(YES):
        return outcome
    return f"no ({numbers.setdefault(outcome, len(numbers) + 1)})"


def read(page: str) -> dict[str, dict[str, str]]:
    """Return the rows of a page."""
    reasons = dict(re.findall(r"^(\d+)\. (.+)$", page, re.MULTILINE))
    lines = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| ")]
    names = lines[0][1:]
    rows: dict[str, dict[str, str]] = {}
    for name, *cells in lines[1:]:
        if not name.startswith(("---", "of ")):
            rows[f"{name}Pipeline"] = {
                column: reasons[cell[4:-1]] if cell.startswith("no (") else cell
                for column, cell in zip(names, cells, strict=True)
            }
    return rows
