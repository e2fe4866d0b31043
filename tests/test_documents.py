"""What the documents tell a user to do works."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from safelight.core.registry import pipelines

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_python_in_the_readme_runs(tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    ran = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert ran.returncode == 0, ran.stderr
    assert (tmp_path / "circle.png").stat().st_size > 500
    assert "denoising" in ran.stdout


def test_the_readme_lists_every_pipeline():
    assert set(re.findall(r"^\| `(\w+)` \|", README, re.MULTILINE)) == set(pipelines())


@pytest.mark.parametrize("document", [path.relative_to(ROOT) for path in ROOT.glob("*.md")], ids=str)
def test_links_lead_somewhere(document):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / document).read_text(encoding="utf-8")):
        assert (ROOT / document.parent / target).exists(), target
