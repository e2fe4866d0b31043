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


@pytest.mark.parametrize("layout", [{"ulysses": 2}, {"ring": 2}, {"tp": 2}], ids=str)
@pytest.mark.parametrize(
    ("recipe", "case"), [("FluxPipeline", "dev"), ("QwenImagePipeline", "48x80"), ("WanPipeline", "2.1")]
)
def test_requests_that_share_forwards_are_divided_too(pools, folders, recipe, case, layout):
    """Texts of unequal length are padded and masked together where the family has a mask."""
    folder = str(folders(recipe))
    for differences in pools(2).run("stacked", folder=folder, recipe=recipe, case=case, layout=layout):
        assert max(differences) < 1e-5


@pytest.mark.parametrize("layout", [{"tp": 2}, {"ulysses": 2}, {"ring": 2}, {"cfg": 2}], ids=str)
@pytest.mark.parametrize("family", ["flux", "qwen_image", "wan"])
def test_the_benchmark_sends_what_it_predicts(pools, family, layout):
    for answer in pools(2).run("benchmark_forward", family=family, layout=layout):
        assert answer["counted"] == answer["predicted"]


@pytest.mark.parametrize("layout", [{"ulysses": 2}, {"ring": 2}, {"tp": 2}], ids=str)
@pytest.mark.parametrize(("recipe", "case"), [("FluxPipeline", "dev"), ("WanImageToVideoPipeline", "TI2V-5B")])
def test_layouts_stand_in_bfloat16(pools, folders, recipe, case, layout):
    variant = "ti2v" if "TI2V" in case else "default"
    asked = {"folder": str(folders(recipe, variant)), "recipe": recipe, "case": case, "layout": layout}
    assert max(pools(2).run("in_bfloat16", **asked)) < 0.05
