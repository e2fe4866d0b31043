"""Tiny checkpoints and the models loaded from them, each made once; requests, and ways to run them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from safelight.core.executor import SyncExecutor
from safelight.core.pipeline import ComposedPipeline
from safelight.core.request import Req
from safelight.core.server_args import ServerArgs
from safelight.loading.loader import load_pipeline
from safelight.testing.recipes import Case, Recipe


class TinyModels:
    """Checkpoints by recipe and variant, and the pipelines loaded from them, ours and the reference's.

    Args:
        root: the folder below which checkpoints are written.

    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._folders: dict[tuple[str, str], Path] = {}
        self._ours: dict[Path, ComposedPipeline] = {}
        self._references: dict[tuple[Path, bool], Any] = {}

    def folder(self, recipe: Recipe, variant: str = "default") -> Path:
        """Return the folder of a checkpoint."""
        key = (recipe.pipeline_name, variant)
        if key not in self._folders:
            folder = self._root / f"{recipe.pipeline_name}-{variant}"
            recipe.write(folder, variant)
            self._folders[key] = folder
        return self._folders[key]

    def ours(self, recipe: Recipe, variant: str = "default") -> ComposedPipeline:
        """Return our pipeline, on the CPU and without a conditioning cache."""
        folder = self.folder(recipe, variant)
        if folder not in self._ours:
            self._ours[folder] = load(folder, conditioning_cache="0")
        return self._ours[folder]

    def reference(self, recipe: Recipe, variant: str = "default", as_installed: bool = False) -> Any:
        """Return the reference."""
        key = (self.folder(recipe, variant), as_installed)
        if key not in self._references:
            self._references[key] = recipe.reference(*key)
        return self._references[key]


def load(folder: Path, **settings: Any) -> ComposedPipeline:
    """Return our pipeline of a checkpoint, on the CPU."""
    return load_pipeline(ServerArgs(str(folder), device="cpu", **settings))


def requests(pipeline: ComposedPipeline, fields: Mapping[str, Any]) -> list[Req]:
    """Return one `Req` an output of what is asked; seed 0 and float32 pixels unless it says otherwise."""
    params_cls = pipeline.schema.params_cls
    params = params_cls.from_fields({"output_type": "np", "seed": 0, **fields}).resolve(pipeline.schema)
    return [Req(request_id=f"r{index}", params=single) for index, single in enumerate(params.split())]


def run_alone(pipeline: ComposedPipeline, req: Req) -> Tensor:
    """Drive a request to its end; return its first picture or video."""
    for _ in SyncExecutor(pipeline).execute(req):
        pass
    made: Tensor = req.outputs[0]
    return made


def alone(pipeline: ComposedPipeline, fields: Mapping[str, Any]) -> list[Tensor]:
    """Return what a request of one output makes when nothing else runs."""
    (req,) = requests(pipeline, fields)
    run_alone(pipeline, req)
    return list(req.outputs)


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    """Say whether two requests made the same bytes."""
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def single(case: Case) -> dict[str, Any]:
    """Return a case's fields for one output."""
    prompt = case.fields.get("prompt")
    return {**case.fields, "prompt": prompt[0] if isinstance(prompt, list) else prompt, "n": 1}


def cases_of(recipe: Recipe) -> list[dict[str, Any]]:
    """Return the first cases of one output on the default checkpoint; they differ in size, text and branches."""
    fit = [case for case in recipe.cases if case.variant == "default" and not case.slow]
    return [{**case.fields, "n": 1} for case in fit if isinstance(case.fields["prompt"], str)][:3]
