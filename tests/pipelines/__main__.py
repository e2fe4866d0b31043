"""Measures every cell and writes the page: `python -m tests.pipelines --write docs/pipelines.md`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")

from tests.backends.recipes.tinies import TINIES
from tests.pipelines.measure import ROOT, Kept, measured
from tests.pipelines.table import markdown


def main() -> None:
    """Measure what is not kept, and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, required=True, help="the page")
    parser.add_argument("--jobs", type=int, default=1, help="how many pipelines are measured at a time")
    given = parser.parse_args()
    kept = Kept(ROOT / "outputs" / "pipelines.json")
    missing = [name for name in TINIES if name not in kept.rows]
    for name, row, seconds in measured(missing, given.jobs) if missing else ():
        kept.keep(name, row)
        print(f"{name}: {seconds:.1f} s", flush=True)
    given.write.write_text(markdown({name: kept.rows[name] for name in TINIES}))


if __name__ == "__main__":
    main()
