"""Tiny checkpoints, as those of the tests of loading."""

from __future__ import annotations

from tests.loading.conftest import checkpoints as checkpoints
