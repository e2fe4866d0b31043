"""The example packages' own tests pass, in a process that knows of them what an installation would tell it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.testing.processes import PLUGIN, install, run_pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def own_tests(package, name, tmp_path, *args):
    install(tmp_path, name)
    paths = (tmp_path, EXAMPLES / package / "src")
    tests = EXAMPLES / package / "tests"
    return run_pytest(*PLUGIN, "-n", "0", "-c", "/dev/null", "--rootdir", tests, *args, tests, cwd=tmp_path, path=paths)


@pytest.mark.slow
@pytest.mark.parametrize(("package", "name"), [("plugin_model", "toy_models"), ("chroma", "chroma_models")])
def test_an_examples_own_tests_pass(package, name, tmp_path):
    """Every suite but that of every solver; warnings are errors, but for those of the reference."""
    code, said = own_tests(package, name, tmp_path, "-W", "error", "-k", "not seed_is_a_seed")
    assert code == 0, said


def test_chroma_is_held_to_diffusers(tmp_path):
    """One case of it, and stacking, in `make test`."""
    chosen = "(test_parity and guided) or call_stacked"
    code, said = own_tests("chroma", "chroma_models", tmp_path, "-k", chosen)
    assert code == 0 and "2 passed" in said, said
