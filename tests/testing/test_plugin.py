"""pytest's plugin costs nothing where nobody asks for it, and a package that is installed breaks no test of ours."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOYS = ROOT / "examples" / "plugin_model" / "src"
PLUGIN = ("-p", "safelight.testing.plugin")
NO_TORCH = """
import sys

def test_nothing_heavy_is_here():
    assert "safelight.testing.plugin" in sys.modules
    assert not {"torch", "diffusers", "transformers", "numpy"} & sys.modules.keys()
"""


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


def test_pytest_starts_without_torch_where_the_plugin_is_installed(tmp_path):
    """As its entry point says, and where a conftest asks for it as well, as ours does."""
    (group,) = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"].items()
    install(tmp_path, "safelight_as_installed", group)
    (tmp_path / "test_own.py").write_text(NO_TORCH)
    (tmp_path / "conftest.py").write_text('pytest_plugins = ("safelight.testing.plugin",)\n')
    code, said = run_pytest("test_own.py", cwd=tmp_path, path=(tmp_path,))
    assert code == 0, said


@pytest.mark.slow
def test_a_package_that_is_installed_breaks_no_test_of_ours(tmp_path):
    """Those that look at all families, with two more of them registered."""
    install(tmp_path, "toy_models")
    listed = "from safelight.core.registry import pipelines; assert 'ToyPipeline' in pipelines()"
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{TOYS}"}
    subprocess.run([sys.executable, "-c", listed], check=True, env=env, timeout=200)
    tests = (
        "tests/core/test_registry.py",
        "tests/core/test_params.py",
        "tests/families/test_parity.py::test_every_pipeline_of_ours_has_a_recipe",
        "tests/test_documents.py::test_the_readme_lists_every_pipeline",
        "tests/test_layout.py",
    )
    code, said = run_pytest("-n", "0", *tests, cwd=ROOT, path=(tmp_path, TOYS))
    assert code == 0, said
