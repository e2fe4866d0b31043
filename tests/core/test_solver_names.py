"""Names of solvers: each stands for classes that there are, and for a number of calls."""

from __future__ import annotations

from pathlib import Path

import diffusers
import pytest

from safelight.core.solver_names import CLASSES, SOLVERS, SPACINGS, all_names, num_calls, parted
from tests.solver_table import table


def test_every_name_has_its_suffixes():
    assert len(all_names()) == len(set(all_names())) == len(SOLVERS) * (1 + len(SPACINGS))
    for name in all_names():
        named, suffix = parted(name)
        assert name == next(key for key, each in SOLVERS.items() if each is named) + (f"_{suffix}" if suffix else "")
    with pytest.raises(KeyError):
        parted("eulr_karras")


def test_every_class_is_the_packages():
    assert all(hasattr(diffusers, name) for name in CLASSES)


@pytest.mark.parametrize(
    ("name", "steps", "calls"),
    [
        *[(None, 5, 5), ("euler", 5, 5), ("heun_karras", 5, 9), ("kdpm2_a", 2, 3), ("heun", 1, 1), ("heun", 0, 0)],
        *[("pndm", 5, 6), ("pndm", 1, 1), ("dpmpp_2m", 1, 1)],
    ],
)
def test_the_number_of_calls(name, steps, calls):
    assert num_calls(name, steps) == calls


def test_the_page_is_what_the_code_takes():
    assert (Path(__file__).parents[2] / "docs" / "solvers.md").read_text() == table()
