"""Pipelines of a package: what is guessed of a request's size, whose call says none."""

from __future__ import annotations

from PIL import Image

from safelight.core.package_params import PackageParams


def test_the_size_is_the_pictures_where_the_call_says_none():
    picture = Image.new("RGB", (80, 60))
    assert PackageParams(image=(picture,)).output_size(1) == (60, 80)
    assert PackageParams().output_size(1) == (1024, 1024)
    assert PackageParams(height=32, image=(picture,)).output_size(1) == (32, 80)
