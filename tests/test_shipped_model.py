"""The model in the package is a real repository of its architecture, and its judge knows good from bad."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from PIL import Image, ImageFilter

from safelight import DiffusionGenerator
from safelight.loading.repository import SHIPPED_MODEL
from training.judge import judge
from training.shapes import draw, prompt_for, split_scenes, varied_prompt_for

MEGABYTE = 10**6


@pytest.fixture(scope="module")
def generator():
    with DiffusionGenerator.from_pretrained(device="cpu") as loaded:
        yield loaded


def test_seeds_give_different_pictures(generator):
    images = generator.generate("a large red circle at the left on a white background", seed=1, n=3).images
    assert len({image.tobytes() for image in images}) == 3
    assert {image.size for image in images} == {(128, 128)}


def test_diffusers_makes_the_same_picture(generator):
    reference = FluxPipeline.from_pretrained(SHIPPED_MODEL, dtype=torch.float32)
    reference.set_progress_bar_config(disable=True)
    params = generator.generate("a small green triangle at the top on a black background", seed=5).params
    expected = reference(
        params.prompt,
        height=params.height,
        width=params.width,
        num_inference_steps=params.num_inference_steps,
        max_sequence_length=params.max_sequence_length,
        generator=torch.Generator().manual_seed(5),
        output_type="np",
    ).images
    ours = generator.generate(params, output_type="np").images
    assert float(np.abs(ours - expected).max()) <= 1e-4


def test_it_is_small_and_whole():
    files = [path for path in SHIPPED_MODEL.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 12 * MEGABYTE
    folders = {path.parent.name for path in files if path.parent != SHIPPED_MODEL}
    components = "scheduler text_encoder text_encoder_2 tokenizer tokenizer_2 transformer vae"
    assert folders == set(components.split())
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".txt", ".md"}


def test_the_judge_knows_drawings_and_tells_them_apart():
    seen, unseen = split_scenes()
    draws = np.random.default_rng(0)
    assert len(unseen) == pytest.approx(0.1 * (len(seen) + len(unseen)), rel=0.02)
    wanted = [seen[i] for i in draws.permutation(len(seen))[:80]]
    assert [judge(draw(scene, draws)).mistakes(scene) for scene in wanted] == [[]] * len(wanted)
    for scene, other in itertools.pairwise(wanted):
        assert judge(draw(scene, draws)).mistakes(other), "the judge took one scene for another"


def test_the_judge_refuses_what_is_not_clean():
    draws = np.random.default_rng(1)
    scene = split_scenes()[0][7]
    picture = np.asarray(draw(scene, draws)).astype(np.int64)
    noisy = np.clip(picture + draws.normal(0, 45, picture.shape), 0, 255).astype(np.uint8)
    assert judge(Image.fromarray(noisy)).scene is None
    assert judge(draw(scene, draws).filter(ImageFilter.GaussianBlur(8))).scene is None
    assert judge(Image.new("RGB", (128, 128), "red")).scene is None


@pytest.mark.parametrize("count", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_it_draws_what_the_prompt_says(generator, count):
    """Colour, background, shape, size and position are all right in 95 of 100; half the prompts were never trained.

    The 200 are those of `training.evaluate`, with its seeds; the 20 are the first of them.
    """
    draws, wrong = np.random.default_rng(1000), {}
    for pool in split_scenes():
        for index, chosen in enumerate(draws.choice(len(pool), 100, replace=False)[: count // 2]):
            picture = generator.generate(prompt_for(pool[chosen]), seed=1000 + index).images[0]
            mistakes = judge(picture).mistakes(pool[chosen])
            if mistakes:
                wrong[prompt_for(pool[chosen])] = mistakes
    assert len(wrong) <= 0.05 * count, wrong


def test_a_person_may_write_it_another_way(generator):
    """Other words, another order, capitals, a period: most are right."""
    draws = np.random.default_rng(7)
    pool, wrong = split_scenes()[0], {}
    for index in draws.choice(len(pool), 20, replace=False):
        prompt = varied_prompt_for(pool[index], draws, default_fraction=0.0)
        mistakes = judge(generator.generate(prompt, seed=int(index)).images[0]).mistakes(pool[index])
        if mistakes:
            wrong[prompt] = mistakes
    assert len(wrong) <= 4, wrong
