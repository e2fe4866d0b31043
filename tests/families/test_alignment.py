"""A model's bytes do not depend on where its files hold the weights, nor on where anything else put a tensor."""

from __future__ import annotations

from safelight.testing.suites import AlignmentSuite
from tests.recipes import all_recipes


class TestAlignment(AlignmentSuite):
    recipes = tuple(all_recipes().values())
