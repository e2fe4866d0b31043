"""Decoding in bands with causal video VAEs, against the undivided decode of the diffusers package."""

from __future__ import annotations

import pytest
import torch

from tests.acceleration.banded import (
    SIZES,
    TOLERANCE,
    bands_of,
    check_costs,
    check_low_precision,
    check_memory,
    check_moved_state,
    noise,
    off_by,
)
from tests.acceleration.vaes import CAUSAL, decoded, latent_shape, relative, small, undivided


@pytest.fixture(scope="module", params=CAUSAL)
def vae(request):
    return small(request.param)


@pytest.mark.parametrize(("height", "width", "rows"), SIZES)
def test_pixels_are_those_of_the_undivided_decode(vae, height, width, rows):
    assert off_by(vae, noise(latent_shape(vae, height, width), seed=height), rows) < TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("num_frames", [5, 13])
@pytest.mark.parametrize("rows", [None, 40])
def test_frames_are_those_of_the_undivided_decode(vae, num_frames, rows):
    latents = noise(latent_shape(vae, 176, 48, num_frames), seed=num_frames)
    pixels = decoded(bands_of(vae, rows), latents)
    assert pixels.shape[1] == num_frames
    assert relative(pixels, undivided(vae, latents)) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_as_near_to_the_truth_as_the_library_is(vae, dtype):
    check_low_precision(vae, dtype)


@torch.no_grad()
def test_channels_last(vae):
    latents = noise(latent_shape(vae, 96, 64))
    given = latents.contiguous(memory_format=torch.channels_last_3d)
    assert relative(decoded(bands_of(vae, 24), given), undivided(vae, latents)) < TOLERANCE


@pytest.mark.parametrize(
    ("kind", "height", "width", "num_frames"),
    [
        ("Wan 2.1", 256, 256, 9),
        ("Wan 2.1", 480, 832, 1),
        pytest.param("Wan 2.1", 136, 200, 17, marks=pytest.mark.slow),
        ("Wan 2.2", 256, 256, 9),
        ("Qwen-Image", 512, 512, 1),
        ("Qwen-Image", 1024, 1024, 1),
        ("Qwen-Image", 200, 136, 1),
    ],
)
def test_less_than_half_the_memory(kind, height, width, num_frames):
    check_memory(kind, height, width, num_frames)


@pytest.mark.slow
@pytest.mark.parametrize("kind", CAUSAL)
def test_units_are_bounded_and_their_cost_is_that_of_the_work(kind):
    check_costs(kind)


def test_the_state_may_be_moved_between_any_two_units(vae):
    check_moved_state(vae)
