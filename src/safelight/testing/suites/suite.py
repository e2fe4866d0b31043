"""What suites are made of: a class of tests over recipes."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar

import pytest

from safelight.testing.recipes import Case, Recipe


class Suite:
    """Tests that take a `recipe`, or a `recipe` and each `case` of it.

    A test file subclasses it, by a name that begins with `Test`, and sets `recipes`.
    """

    recipes: ClassVar[Sequence[Recipe]] = ()
    """What the tests run over."""
    quick_cases: ClassVar[int | None] = None
    """Of each recipe, so many of its first cases are not marked `slow`; None marks none but those that say so."""
    slow_recipes: ClassVar[Mapping[str, Collection[str]]] = {}
    """By test, names of the pipelines for which it is marked `slow`."""

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Make a test for each recipe, or each case."""
        asked = set(metafunc.fixturenames)
        if {"recipe", "case"} <= asked:
            params = [
                param(recipe, case, slow=case.slow or case not in recipe.cases[: self.quick_cases])
                for recipe in self.recipes
                for case in recipe.cases
            ]
            metafunc.parametrize(("recipe", "case"), params)
        elif "recipe" in asked:
            slow = self.slow_recipes.get(metafunc.function.__name__, ())
            chosen = [each for each in self.recipes if each.difference is not None or "otherwise_rows" not in asked]
            metafunc.parametrize("recipe", [param(each, slow=each.pipeline_name in slow) for each in chosen])

    @pytest.fixture(autouse=True)
    def _small_constants(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
        """Make the constants of a reference small where its recipe says so, but for cases of the real ones."""
        recipe, case = (
            request.getfixturevalue(name) if name in request.fixturenames else None for name in ("recipe", "case")
        )
        if recipe is not None and recipe.patch is not None and (case is None or case.patched):
            recipe.patch(monkeypatch)


def param(recipe: Recipe, *case: Case, slow: bool) -> Any:
    """Return a test's recipe, or recipe and case, by their names."""
    name = ": ".join((recipe.pipeline_name, *(each.name for each in case)))
    return pytest.param(recipe, *case, id=name, marks=[pytest.mark.slow] if slow else [])
