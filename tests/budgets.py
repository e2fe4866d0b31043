"""How many code lines each folder may have, why, and how full it is: `make test` prints it at its end."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from safelight.core.registry import pipelines

SOURCE = Path(__file__).parents[1] / "src" / "safelight"
FAMILIES = SOURCE / "families"
FILES = sorted(SOURCE.rglob("*.py"))
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}
FAMILY_NAMES = sorted(path.name for path in FAMILIES.iterdir() if path.is_dir() and not path.name.startswith("_"))
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
OVER = 1.25
"""A budget is a habit: what is over is printed, and fails at this factor."""
ROOT = "the root's files"


@dataclass(frozen=True)
class Budget:
    """What one folder may have, or several that are one thing.

    Attributes:
        folders: names under `src/safelight`; none are the files that lie in no folder.
        lines: of code.
        reason: why as many, and no more.

    """

    folders: tuple[str, ...]
    lines: int
    reason: str

    @property
    def name(self) -> str:
        """How it is listed."""
        return ", ".join(self.folders) or ROOT

    def used(self) -> int:
        """Return the code lines that are there."""
        return sum(code_lines(path) for path in FILES if self.holds(path))

    def holds(self, path: Path) -> bool:
        """Say whether a file counts here."""
        folder = path.relative_to(SOURCE).parent.as_posix()
        if not self.folders:
            return folder in (".", "families")
        return any(folder == name or folder.startswith(f"{name}/") for name in self.folders)

    def line(self) -> str:
        """Return how full it is, for people."""
        used = self.used()
        over = "over: " if used > self.lines else ""
        return f"{self.name:<20}{used:>6} of {self.lines:>5}{used / self.lines:>6.0%}  {over}{self.reason}"


PARTS = (
    Budget((), 1350, "errors, generator, client, results, media, clips: a file for each thing that users touch"),
    Budget(("core",), 1800, "contracts that everything imports, and solvers by name: read in an afternoon"),
    Budget(("stages",), 900, "ten standard stages of less than a hundred lines"),
    Budget(("layers",), 800, "what two families share, and nothing that one alone needs"),
    Budget(("attention",), 400, "one layer and a table of backends"),
    Budget(("backends",), 1900, "a hundred pipelines of a package by one mechanism: calls handed over, kept, stacked"),
    Budget(("loading",), 2200, "repositories of others are checked here, every key; plans from JSON, ours and theirs"),
    Budget(("adapters",), 600, "conventions of LoRA files, stores, unmerged and merged: not begun"),
    Budget(("parallel",), 1200, "tokens, weights, branches and rows, each a strategy from outside"),
    Budget(("acceleration",), 3000, "compile, offload, quantisation, step cache, fused operations and CPU routes"),
    Budget(("runtime",), 2500, "the worker's side, and what watches it"),
    Budget(("serving",), 4800, "HTTP, keys, leases, jobs, files: the largest part, for it faces strangers"),
    Budget(("cluster",), 900, "many machines, by Ray Serve and shared stores: not begun"),
    Budget(("checking",), 800, "a model against its reference, call by call"),
    Budget(("testing",), 1500, "suites that plugins use too; counted apart"),
    Budget(("cli",), 800, "commands: what they say, and nothing that they do"),
)
"""Every folder but families; the numbers are the design's."""


def families() -> Iterator[Budget]:
    """Yield each family's: 500 lines for pictures, 700 for videos, and 100 for each further pipeline class."""
    for family in FAMILY_NAMES:
        classes = [entry for entry in pipelines().values() if entry.model_family == family]
        makes_video = any("V" in entry.pipeline_config_cls().task for entry in classes)
        lines = (700 if makes_video else 500) + 100 * (len(classes) - 1)
        yield Budget(
            (f"families/{family}",), lines, f"{'videos' if makes_video else 'pictures'}, {len(classes)} classes"
        )


@functools.cache
def all_budgets() -> tuple[Budget, ...]:
    """Return every budget."""
    return (*PARTS, *families())


@functools.cache
def code_lines(path: Path) -> int:
    """Return the lines of a file that are neither blank, nor comments, nor docstrings."""
    tree, docs = TREES[path], set()
    for node in ast.walk(tree):
        if (
            isinstance(node, (*FUNCTIONS, ast.ClassDef, ast.Module))
            and ast.get_docstring(node, clean=False) is not None
        ):
            docs |= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    lines = enumerate(path.read_text().splitlines(), 1)
    return sum(1 for n, line in lines if line.strip() and not line.lstrip().startswith("#") and n not in docs)
