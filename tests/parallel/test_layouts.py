"""Every pipeline in every layout gives what one rank gives, and sends what the formulas say."""

from __future__ import annotations

import pytest

from tests.recipes import all_recipes

TOLERANCE = 1e-5

QUICK_CASES = [
    ("FluxPipeline", "dev, true CFG"),
    ("QwenImageEditPlusPipeline", "time 0 for images, true CFG"),
    ("WanImageToVideoPipeline", "TI2V-5B"),
]
TWO = [{"tp": 2}, {"ulysses": 2}, {"ring": 2}, {"cfg": 2}, {"cfg": 2, "vae": True}]
FOUR = [{"ring": 2, "ulysses": 2}, {"cfg": 2, "ulysses": 2}, {"ulysses": 2, "tp": 2}, {"cfg": 4, "vae": True}]
CASES = {
    "FluxPipeline": ("dev", "dev, 36x100, long prompt", "schnell, true CFG"),
    "FluxKontextPipeline": ("image, true CFG, n=2", "image as it is, other aspect"),
    "QwenImagePipeline": ("48x80", "true CFG, long prompt"),
    "QwenImageEditPipeline": ("true CFG", "own size, long prompt"),
    "QwenImageEditPlusPipeline": ("three images, true CFG", "two images, own size"),
    "QwenImageLayeredPipeline": ("two layers, true CFG", "four layers, long prompt"),
    "WanPipeline": ("2.1", "2.1, 80x32, 9 frames", "2.2"),
    "WanImageToVideoPipeline": ("2.1", "2.1, last image", "TI2V-5B"),
    "WanDMDPipeline": ("FastWan", "TI2V-5B"),
}
"""For each pipeline cases whose tokens divide by four, and others whose tokens do not."""


def ids(value):
    return " ".join(f"{axis}{int(size)}" for axis, size in value.items()) if isinstance(value, dict) else None


@pytest.mark.parametrize("layout", TWO[:-2] + TWO[-1:], ids=ids)
@pytest.mark.parametrize(("recipe", "case"), QUICK_CASES)
def test_two_ranks_give_what_one_gives(recipe, case, layout, compare):
    assert compare(recipe, case, **layout).difference <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("layout", TWO + FOUR, ids=ids)
@pytest.mark.parametrize(("recipe", "case"), [(recipe, case) for recipe, cases in CASES.items() for case in cases])
def test_every_layout_gives_what_one_rank_gives(recipe, case, layout, compare):
    assert compare(recipe, case, **layout).difference <= TOLERANCE


def test_every_pipeline_of_ours_is_compared():
    assert set(CASES) == set(all_recipes())
