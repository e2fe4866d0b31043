"""Decoding in bands with norms over the whole picture, against the undivided decode of the diffusers package."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import AutoencoderKL

from safelight.acceleration.activations import count_peak
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
from tests.acceleration.vaes import (
    decoded,
    group_norm_options,
    latent_shape,
    peak_activation_bytes,
    relative,
    small,
    undivided,
)

KIND = "AutoencoderKL"


@pytest.fixture(scope="module")
def vae():
    return small(KIND)


@pytest.mark.parametrize(("height", "width", "rows"), SIZES)
def test_pixels_are_those_of_the_undivided_decode(vae, height, width, rows):
    assert off_by(vae, noise(latent_shape(vae, height, width), seed=height), rows) < TOLERANCE


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "options",
    [
        {"use_post_quant_conv": True, "latent_channels": 4},
        {"mid_block_add_attention": False},
        group_norm_options(8, 16, layers_per_block=1),
        group_norm_options(8, 8, 16, norm_num_groups=8),
    ],
    ids=["quant conv", "no attention", "two levels", "one channel a group"],
)
def test_other_configurations(options, seed):
    vae = small(KIND, seed, **options)
    assert off_by(vae, noise((1, vae.config.latent_channels, 11, 7), seed), 5) < TOLERANCE


@torch.no_grad()
def test_statistics_far_from_zero(vae):
    """A picture whose activations lie far from zero, beside its spread, and differ from band to band."""
    vae = copy.deepcopy(vae)
    vae.decoder.conv_in.bias += 300.0
    decoder, exact = bands_of(vae, 3), copy.deepcopy(vae).double()
    latents = noise(latent_shape(vae, 128, 64)) * torch.linspace(0.01, 8, 16)[:, None]
    expected = undivided(exact, latents.double())
    assert relative(decoded(decoder, latents), expected) < 2 * relative(undivided(vae, latents), expected) + TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_as_near_to_the_truth_as_the_library_is(vae, dtype):
    check_low_precision(vae, dtype)


@torch.no_grad()
def test_channels_last(vae):
    latents = noise(latent_shape(vae, 96, 64))
    decoder = bands_of(copy.deepcopy(vae).to(memory_format=torch.channels_last), 24)
    given = latents.contiguous(memory_format=torch.channels_last)
    assert relative(decoded(decoder, given), undivided(vae, latents)) < TOLERANCE


@pytest.mark.parametrize(("height", "width"), [(512, 512), (256, 328), pytest.param(1024, 768, marks=pytest.mark.slow)])
def test_less_than_half_the_memory(height, width):
    check_memory(KIND, height, width)


@torch.no_grad()
def test_the_count_is_that_of_a_real_decode(vae):
    with torch.device("meta"):
        meta = AutoencoderKL(**group_norm_options(8, 16, 16, 32))
    shape = latent_shape(meta, 128, 96)
    decoder, latents = bands_of(vae), noise(shape)
    counted = peak_activation_bytes(meta, shape, in_bands=True)
    assert count_peak(lambda: decoded(decoder, latents)) == pytest.approx(counted, rel=1e-3)


@pytest.mark.slow
def test_units_are_bounded_and_their_cost_is_that_of_the_work():
    check_costs(KIND)


def test_the_state_may_be_moved_between_any_two_units(vae):
    check_moved_state(vae)
