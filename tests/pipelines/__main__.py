"""Measures every cell and writes the page: `python -m tests.pipelines --write docs/pipelines.md`.

Rows are kept beside as they are measured: `--resume` goes on with those that are there.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import tempfile
import time
import warnings
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")

import diffusers
import torch
import transformers

from safelight.acceleration.compile import CACHE_VARIABLE
from tests.backends.recipes.tinies import TINIES
from tests.pipelines.columns import COLUMNS
from tests.pipelines.subject import Subject
from tests.pipelines.table import markdown

KEPT = Path("outputs/pipelines.json")


def main() -> None:
    """Measure, and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, required=True, help="the page")
    parser.add_argument("--resume", action="store_true", help="go on with the rows that were measured before")
    parser.add_argument("names", nargs="*", help="measure these pipelines anew, and leave the others as they were")
    given = parser.parse_args()
    quiet()
    rows = json.loads(KEPT.read_text()) if (given.resume or given.names) and KEPT.exists() else {}
    KEPT.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        os.environ[CACHE_VARIABLE] = str(Path(folder) / "inductor")
        for name in given.names or [name for name in TINIES if name not in rows]:
            begun = time.perf_counter()
            rows[name] = row_of(name, Path(folder) / name)
            KEPT.write_text(json.dumps(rows, indent=1))
            print(f"{name}: {time.perf_counter() - begun:.1f} s", flush=True)  # noqa: T201 the command's output
    given.write.write_text(markdown({name: rows[name] for name in TINIES if name in rows}))


def row_of(name: str, folder: Path) -> dict[str, str]:
    """Return a pipeline's cells."""
    subject = Subject(TINIES[name], folder)
    return {column.name: column.outcome(subject) for column in COLUMNS}


def quiet() -> None:
    """Leave out what libraries say beside."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    diffusers.logging.set_verbosity_error()
    transformers.logging.set_verbosity_error()


if __name__ == "__main__":
    main()
