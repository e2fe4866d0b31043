"""Recipes: how to build a tiny random checkpoint of each pipeline, and what to ask of it.

A family joins the suites in `tests/families` by a module here that fills `RECIPES`; nothing else has to change.
"""

from __future__ import annotations

import importlib
import pkgutil

from tests.recipes.base import Case, Recipe

__all__ = ["Case", "Recipe", "all_recipes"]


def all_recipes() -> dict[str, Recipe]:
    """Return every recipe by the class name of its pipeline."""
    found: dict[str, Recipe] = {}
    for module in pkgutil.iter_modules(__path__):
        imported = importlib.import_module(f"{__name__}.{module.name}")
        if module.name not in ("base", "tokenizers"):
            found.update({recipe.pipeline_name: recipe for recipe in imported.RECIPES})
    return found
