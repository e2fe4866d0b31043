"""A seed is a seed: with every solver that a family accepts, whatever else draws from torch's own generator."""

from __future__ import annotations

from safelight.testing.suites import SeedsSuite
from tests.recipes import all_recipes


class TestSeeds(SeedsSuite):
    recipes = tuple(all_recipes().values())
