"""Breaks each promise in a copy of the project, and sees its test fail: `python -m tests.mutations [NAME ...]`."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.mutations.table import MUTATIONS, ROOT, Mutation

FAILED = 1
"""Of pytest's exit codes: tests ran, and some failed. Others mean that none ran."""


@contextmanager
def copied() -> Iterator[Path]:
    """Give a copy of what belongs to the project."""
    with tempfile.TemporaryDirectory(prefix="safelight-mutations-") as folder:
        root = Path(folder) / "safelight"
        shutil.copytree(ROOT, root, ignore=shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "outputs"))
        yield root


def run(root: Path, *tests: str) -> subprocess.CompletedProcess[str]:
    """Run tests on the code of a copy, to the first failure."""
    known = os.environ.get("PYTHONPATH")
    path = f"{root / 'src'}:{root}" + (f":{known}" if known else "")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--slow", *tests]
    env = {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, timeout=1800)


def broken(root: Path, mutation: Mutation) -> str | None:
    """Apply a change to a copy and run its test; return why the promise is not held by it, None where it is."""
    text = mutation.apply(root)
    try:
        ran = run(root, mutation.test)
    finally:
        mutation.revert(root, text)
    if ran.returncode == FAILED:
        return None
    return "its test passes all the same" if ran.returncode == 0 else f"its test cannot run: {ran.stdout[-2000:]}"


def failing(root: Path, mutations: Sequence[Mutation]) -> str | None:
    """Return what the tests say that do not pass on a copy as it is: they would see nothing. None if all pass."""
    ran = run(root, *dict.fromkeys(each.test for each in mutations))
    return None if ran.returncode == 0 else ran.stdout[-4000:]


def main() -> None:
    """Break what is asked for, or everything, and say what was seen."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="of promises; none is all")
    names = parser.parse_args().names
    if unknown := set(names) - {each.name for each in MUTATIONS}:
        parser.error(f"NAME: got {', '.join(sorted(unknown))}; it takes {', '.join(each.name for each in MUTATIONS)}")
    chosen = [each for each in MUTATIONS if not names or each.name in names]
    wrong = 0
    with copied() as root:
        print(f"running {len(chosen)} tests on what is not broken", flush=True)
        if (said := failing(root, chosen)) is not None:
            sys.exit(f"tests fail on what is not broken:\n{said}")
        for mutation in chosen:
            reason = broken(root, mutation)
            wrong += reason is not None
            print(f"{mutation.promise}: {reason or 'broken, and seen'}", flush=True)
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
