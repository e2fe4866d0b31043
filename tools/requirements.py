"""Exact versions of packages: those that are tested, and the lowest that the ranges of `pyproject.toml` admit.

    pip install --dry-run --ignore-installed --report REPORT '.[test]'
    python tools/requirements.py lock REPORT > constraints.txt
    python tools/requirements.py floors torch==2.13.0 > floors.txt

Needs nothing but Python: it runs before anything is installed.
"""

from __future__ import annotations

import json
import re
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

HEADER = """\
# Made by `make lock`; do not edit. Every package that was tested, those that others bring among them, for
# `pip install -c`: a version here binds whoever installs the package, and installs nothing by itself.
"""

OF_A_HOST = re.compile(r"(nvidia|cuda)([-_].*)?$")
"""Packages of one kind of machine, which come with some builds of torch alone: they stay as torch asks for them."""

FLOOR = re.compile(r"([A-Za-z0-9._-]+)\s*(?:\[[^]]*\])?\s*(?:>=|==)\s*([0-9][^,;\s]*)")


def canonical(name: str) -> str:
    """Return a package's name as registries write it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def public(version: str) -> str:
    """Return a version without the label of a local build, such as `+cpu` (PEP 440)."""
    return version.partition("+")[0]


def locked(report: Mapping[str, Any], project: str) -> list[str]:
    """Return `name==version` of every package in a report of pip's, but the project itself.

    Args:
        report: what `pip install --report` writes.
        project: the name of the project.

    """
    packages = {canonical(item["metadata"]["name"]): public(item["metadata"]["version"]) for item in report["install"]}
    return [
        f"{name}=={version}"
        for name, version in sorted(packages.items())
        if name != canonical(project) and not OF_A_HOST.match(name)
    ]


def floors(requirements: Sequence[str], instead: Sequence[str] = ()) -> Iterator[str]:
    """Return `name==version` of the lowest version that each requirement admits.

    Args:
        requirements: as in `pyproject.toml`, each with a lower bound.
        instead: `name==version` for packages of which another is taken.

    Raises:
        ValueError: for a requirement without a lower bound.

    """
    other = {canonical(pin.partition("==")[0]): pin for pin in instead}
    for requirement in requirements:
        found = FLOOR.match(requirement)
        if found is None:
            raise ValueError(f"{requirement!r} has no lower bound")
        name = canonical(found[1])
        yield other.get(name, f"{name}=={found[2]}")


def main(arguments: Sequence[str]) -> None:
    """Print constraints."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    match arguments:
        case ["lock", report]:
            read = json.loads(Path(report).read_text(encoding="utf-8"))
            print(HEADER + "\n".join(locked(read, project["name"])))
        case ["floors", *instead]:
            print("\n".join(floors(project["dependencies"], instead)))
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
