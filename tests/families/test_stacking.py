"""Requests whose calls are made as one forward give what each gives alone."""

from __future__ import annotations

from safelight.testing.suites import StackingSuite
from tests.recipes import all_recipes


class TestStacking(StackingSuite):
    recipes = tuple(all_recipes().values())
