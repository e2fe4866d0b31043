"""pytest in a process of its own, and packages that look installed to it."""

from __future__ import annotations

import os
import subprocess
import sys

PLUGIN = ("-p", "safelight.testing.plugin")


def run_pytest(*args, cwd, path=()):
    """Run pytest in a process of its own; return its exit code, and what it said."""
    found = os.pathsep.join([*map(str, path), *filter(None, [os.environ.get("PYTHONPATH")])])
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *map(str, args)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": found},
        capture_output=True,
        text=True,
        timeout=500,
    )
    return ran.returncode, ran.stdout + ran.stderr


def install(folder, name, group=None):
    """Lay a package's entry points into a folder of the path, as an installation does; a family's unless given."""
    heading, points = group or ("safelight.families", {name: name})
    metadata = folder / f"{name}-0.1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1.0\n")
    lines = (f"{point} = {target}\n" for point, target in points.items())
    (metadata / "entry_points.txt").write_text(f"[{heading}]\n{''.join(lines)}")
