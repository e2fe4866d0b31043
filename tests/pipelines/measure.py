"""Measures the rows of the table, several at a time; those that are measured are kept, for the same code."""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

import diffusers
import torch
import transformers

from safelight.acceleration.compile import CACHE_VARIABLE
from tests.backends.recipes.tinies import TINIES
from tests.pipelines.columns import COLUMNS
from tests.pipelines.subject import Subject

ROOT = Path(__file__).parents[2]
CODE = ("src/safelight", "tests/backends/recipes", "tests/pipelines")
"""Of which every row is."""


@dataclass
class Kept:
    """The rows that were measured with this very code, in a file.

    Attributes:
        path: the file's.
        rows: by the pipelines' names.

    """

    path: Path
    rows: dict[str, dict[str, str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Read what is there, if it is of this code."""
        self.code = digest()
        kept = json.loads(self.path.read_text()) if self.path.exists() else {}
        self.rows = kept["rows"] if kept.get("code") == self.code else {}
        self.path.parent.mkdir(exist_ok=True)

    def keep(self, name: str, row: dict[str, str]) -> None:
        """Keep a row."""
        self.rows[name] = row
        self.path.write_text(json.dumps({"code": self.code, "rows": self.rows}, indent=1))


def digest() -> str:
    """Return a digest of the code that rows are of."""
    hashed = hashlib.sha256()
    for path in sorted(path for folder in CODE for path in (ROOT / folder).rglob("*.py")):
        hashed.update(path.read_bytes())
    return hashed.hexdigest()


def measured(names: Sequence[str], jobs: int) -> Iterator[tuple[str, dict[str, str], float]]:
    """Yield each pipeline's name, its row, and in how many seconds it was measured, as they come."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ[CACHE_VARIABLE] = str(Path(folder) / "inductor")
        spawned = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(jobs, spawned, quiet) as pool:
            pending = {pool.submit(row_of, name, Path(folder) / name): name for name in names}
            for done in as_completed(pending):
                yield (pending[done], *done.result())


def row_of(name: str, folder: Path) -> tuple[dict[str, str], float]:
    """Return a pipeline's row, and in how many seconds it was measured."""
    begun = time.perf_counter()
    subject = Subject(TINIES[name], folder)
    row = {column.name: column.outcome(subject) for column in COLUMNS}
    shutil.rmtree(folder)
    return row, time.perf_counter() - begun


def quiet() -> None:
    """Leave out what libraries say beside."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    diffusers.logging.set_verbosity_error()
    transformers.logging.set_verbosity_error()
