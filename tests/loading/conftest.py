"""Tiny checkpoints, built once a session, and copies of them to damage; and which files a test opens."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import diffusers
import pytest
import torch

from safelight import DiffusionGenerator, ServerArgs
from safelight.errors import ModelIndexError
from safelight.loading.loader import load_pipeline
from tests.backends import builders
from tests.recipes import all_recipes, flux

COMMON = {"prompt": "a cat", "height": 32, "width": 48, "num_inference_steps": 2}
DIFFUSERS_ONLY = {"StableDiffusionPipeline": builders.stable_diffusion}


class Checkpoints:
    """Tiny FLUX.1 folders by variant: `dev`, `schnell`, `kontext`."""

    def __init__(self, root):
        self._root = root

    def folder(self, variant="dev"):
        folder = self._root / variant
        if not folder.exists():
            build = flux.build_kontext if variant == "kontext" else flux.build
            build(folder, "schnell" if variant == "schnell" else "default")
        return folder

    def copy(self, target, variant="dev"):
        return shutil.copytree(self.folder(variant), target)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    return Checkpoints(tmp_path_factory.mktemp("flux"))


@pytest.fixture
def damaged(checkpoints, tmp_path):
    """A copy of the model that a test may do anything to."""
    return checkpoints.copy(tmp_path / "damaged")


def edit_json(path, **changes):
    """Change entries of a JSON object in a file; None for `...` removes one."""
    value = json.loads(path.read_text())
    value.update(changes)
    path.write_text(json.dumps({name: entry for name, entry in value.items() if entry is not ...}))


@pytest.fixture(scope="session")
def original(tmp_path_factory):
    """Return a function that gives a pipeline's folder, built once."""
    folders = {}

    def of(name):
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp("original") / name
            if name in DIFFUSERS_ONLY:
                torch.manual_seed(0)
                getattr(diffusers, name)(**DIFFUSERS_ONLY[name](folders[name])).save_pretrained(folders[name])
            else:
                all_recipes()[name].build(folders[name], "default")
        return folders[name]

    return of


@pytest.fixture
def changed(original, tmp_path):
    """Return a function that gives a pipeline's folder to change."""
    return lambda name: shutil.copytree(original(name), tmp_path / name)


def pixels(folder, **fields):
    """Return what a folder's model makes of `COMMON`."""
    with DiffusionGenerator.from_pretrained(folder, device="cpu") as generator:
        result = generator.generate(seed=0, output_type="np", **{**COMMON, **fields})
        return result.videos if result.videos is not None and len(result.videos) else result.images


heard: list[str] = []
listening: list[Path] = []


def hear(event, args):
    if listening and event == "open" and isinstance(args[0], str | bytes | os.PathLike):
        heard.append(os.fsdecode(args[0]))


sys.addaudithook(hear)


@pytest.fixture
def opened():
    """Return the names of the files that were opened since the fixture began."""
    heard.clear()
    listening.append(Path())
    yield heard
    listening.clear()


def refusal(folder, error=ModelIndexError):
    """Return the one line with which a model is refused, weights or no weights."""
    with pytest.raises(error) as caught:
        load_pipeline(ServerArgs(str(folder), device="cpu"))
    assert "\n" not in str(caught.value)
    return str(caught.value)
