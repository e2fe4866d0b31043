"""What suites are made of: a class of tests over recipes."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import ClassVar

import pytest

from safelight.testing.recipes import Recipe


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
        if {"recipe", "case"} <= set(metafunc.fixturenames):
            metafunc.parametrize(
                ("recipe", "case"),
                [
                    pytest.param(
                        recipe,
                        case,
                        id=f"{recipe.pipeline_name}: {case.name}",
                        marks=[pytest.mark.slow] if case.slow or case not in recipe.cases[: self.quick_cases] else [],
                    )
                    for recipe in self.recipes
                    for case in recipe.cases
                ],
            )
        elif "recipe" in metafunc.fixturenames:
            differing = "otherwise_rows" in metafunc.fixturenames
            chosen = [recipe for recipe in self.recipes if recipe.difference is not None or not differing]
            slow = self.slow_recipes.get(metafunc.function.__name__, ())
            marks = {name: [pytest.mark.slow] for name in slow}
            params = [
                pytest.param(recipe, id=recipe.pipeline_name, marks=marks.get(recipe.pipeline_name, []))
                for recipe in chosen
            ]
            metafunc.parametrize("recipe", params)

    @pytest.fixture(autouse=True)
    def _small_constants(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
        """Make the constants of a reference small where its recipe says so, but for cases of the real ones."""
        recipe, case = (
            request.getfixturevalue(name) if name in request.fixturenames else None for name in ("recipe", "case")
        )
        if recipe is not None and recipe.patch is not None and (case is None or case.patched):
            recipe.patch(monkeypatch)
