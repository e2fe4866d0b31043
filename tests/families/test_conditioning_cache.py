"""Embeddings and image latents of earlier requests: found again for the same inputs alone, to the byte."""

from __future__ import annotations

from safelight.testing.suites import ConditioningSuite
from tests.recipes import all_recipes


class TestConditioning(ConditioningSuite):
    recipes = tuple(all_recipes().values())
