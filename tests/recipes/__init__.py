"""The recipes of our own families: how to build a tiny random checkpoint of each pipeline, and what to ask of it.

A family joins the suites in `tests/families` by a module here that fills `RECIPES`; nothing else has to change.
"""

from __future__ import annotations

import importlib
import pkgutil

from safelight import families
from safelight.core.registry import PipelineEntry, pipelines
from safelight.testing.recipes import Recipe


def own_pipelines() -> dict[str, PipelineEntry]:
    """Return the pipelines of this tree: packages that are installed beside it bring theirs, to their own tests."""
    return {name: entry for name, entry in pipelines().items() if entry.package.startswith(f"{families.__name__}.")}


def all_recipes() -> dict[str, Recipe]:
    """Return every recipe by the class name of its pipeline."""
    found: dict[str, Recipe] = {}
    for module in pkgutil.iter_modules(__path__):
        imported = importlib.import_module(f"{__name__}.{module.name}")
        found.update({recipe.pipeline_name: recipe for recipe in imported.RECIPES})
    return found
