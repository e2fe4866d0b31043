"""pytest's plugin costs nothing where nobody asks for it, and a package that is installed breaks no test of ours."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.testing.processes import install, run_pytest

ROOT = Path(__file__).parents[2]
TOYS = ROOT / "examples" / "plugin_model" / "src"
NO_TORCH = """
import sys

def test_nothing_heavy_is_here():
    assert "safelight.testing.plugin" in sys.modules
    assert not {"torch", "diffusers", "transformers", "numpy"} & sys.modules.keys()
"""


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
