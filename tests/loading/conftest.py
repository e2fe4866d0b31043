"""Tiny checkpoints, built once a session, and copies of them to damage."""

from __future__ import annotations

import json
import shutil

import pytest

from tests.recipes import flux


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
