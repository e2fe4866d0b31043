"""Every pipeline that has a tiny checkpoint here, by its name."""

from __future__ import annotations

from collections.abc import Mapping

from tests.backends.recipes import pictures, unets, videos
from tests.backends.recipes.build import Tiny

TINIES: Mapping[str, Tiny] = {tiny.name: tiny for part in (unets, pictures, videos) for tiny in part.TINIES}
