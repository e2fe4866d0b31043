"""Files in a folder that say so when they are run or read."""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path

CUSTOMIZE = ("sitecustomize", "usercustomize")
NAMES = {"safelight", *importlib.metadata.packages_distributions(), *sys.stdlib_module_names, *CUSTOMIZE}


def set_traps(folder: Path) -> Path:
    """Put modules into a folder that say so when one is imported, and a package that registers a pipeline.

    Besides them lie files by which a module, or a setting of a tool, could come in another way.
    """
    told = folder / "owned"
    for name in NAMES:
        if name.isidentifier():
            (folder / f"{name}.py").write_text(f"open({str(told)!r}, 'a').write(__name__ + '\\n')\n")
    known = folder / "evil-1.0.dist-info"
    known.mkdir()
    (known / "METADATA").write_text("Metadata-Version: 2.1\nName: evil\nVersion: 1.0\n")
    (known / "entry_points.txt").write_text("[safelight.families]\nevil = evil_pipeline:register\n")
    (folder / "evil_pipeline.py").write_text(f"open({str(told)!r}, 'a').write('a plugin\\n')\n")
    (folder / "evil.pth").write_text(f"import os; open({str(told)!r}, 'a').write('a path file\\n')\n")
    for name in ("_ctypes.so", "_sqlite3.abi3.so", "pyvenv.cfg", "setup.cfg", "pyproject.toml", "python311._pth"):
        (folder / name).write_text("home = /nowhere\n")
    (folder / "conftest.py").write_text(f"open({str(told)!r}, 'a').write('a conftest\\n')\n")
    return told
