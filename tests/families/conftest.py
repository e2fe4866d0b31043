"""Tiny checkpoints and loaded models, each made once a session."""

from __future__ import annotations

import pytest
import torch

from safelight import ServerArgs
from safelight.core.request import Req
from safelight.loading.loader import load_pipeline
from tests.recipes import all_recipes


def pytest_generate_tests(metafunc):
    """Parametrise over the registry: a pipeline that is registered has a recipe, or the suite fails."""
    recipes = all_recipes()
    if {"recipe", "case"} <= set(metafunc.fixturenames):
        quick = getattr(metafunc.module, "QUICK_CASES", None)
        metafunc.parametrize(
            ("recipe", "case"),
            [
                pytest.param(
                    recipe,
                    case,
                    id=f"{name}: {case.name}",
                    marks=[pytest.mark.slow] if case.slow or case not in recipe.cases[:quick] else [],
                )
                for name, recipe in recipes.items()
                for case in recipe.cases
            ],
        )
    elif "recipe" in metafunc.fixturenames:
        differing = "otherwise_rows" in metafunc.fixturenames
        chosen = {name: recipe for name, recipe in recipes.items() if recipe.difference is not None or not differing}
        slow = getattr(metafunc.module, "SLOW_RECIPES", {}).get(metafunc.function.__name__, ())
        metafunc.parametrize(
            "recipe",
            [
                pytest.param(recipe, id=name, marks=[pytest.mark.slow] if name in slow else [])
                for name, recipe in chosen.items()
            ],
        )


@pytest.fixture(autouse=True)
def _small_constants(request, monkeypatch):
    """Make the constants of a reference small where its recipe says so, but for cases of the real ones."""
    recipe, case = (
        request.getfixturevalue(name) if name in request.fixturenames else None for name in ("recipe", "case")
    )
    if recipe is not None and recipe.patch is not None and (case is None or case.patched):
        recipe.patch(monkeypatch)


class Models:
    """Checkpoints by recipe and variant, and the pipelines loaded from them."""

    def __init__(self, root):
        self._root = root
        self._folders = {}
        self._ours = {}
        self._references = {}

    def folder(self, recipe, variant="default"):
        key = (recipe.pipeline_name, variant)
        if key not in self._folders:
            folder = self._root / f"{recipe.pipeline_name}-{variant}"
            recipe.build(folder, variant)
            self._folders[key] = folder
        return self._folders[key]

    def ours(self, recipe, variant="default"):
        folder = self.folder(recipe, variant)
        if folder not in self._ours:
            self._ours[folder] = load_pipeline(ServerArgs(str(folder), device="cpu", conditioning_cache="0"))
        return self._ours[folder]

    def reference(self, recipe, variant="default", as_installed=False):
        key = (self.folder(recipe, variant), as_installed)
        if key not in self._references:
            self._references[key] = recipe.reference(key[0], as_installed)
        return self._references[key]


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    torch.manual_seed(0)
    return Models(tmp_path_factory.mktemp("checkpoints"))


def requests(pipeline, fields):
    """Return one `Req` an output of what is asked."""
    params_cls = pipeline.schema.params_cls
    params = params_cls.from_fields({"output_type": "np", "seed": 0, **fields}).resolve(pipeline.schema)
    return [Req(request_id=f"r{index}", params=single) for index, single in enumerate(params.split())]
