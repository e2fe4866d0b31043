"""Decoding in bands against the undivided decode of the diffusers package: pixels, and bytes alive at one time."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderKLHunyuanVideo, AutoencoderKLWan, AutoencoderTiny

from safelight.acceleration.tiled_vae import BandPlan, decode_in_bands, decoded, peak_activation_bytes
from safelight.errors import InvalidParameterError
from safelight.layers.bands import Bands
from tests.acceleration.vaes import (
    CAUSAL,
    KINDS,
    group_norm_options,
    latent_shape,
    relative,
    small,
    undivided,
    wide,
)

ATTENTION = ("UpDecoderBlock2D", "AttnUpDecoderBlock2D")
TOLERANCE = 1e-5
MOST = 0.45


def bands_of(vae, rows=None):
    return decode_in_bands(copy.deepcopy(vae), BandPlan(rows))


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def noise(shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture(scope="module")
def vaes():
    return {kind: small(kind) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("height", "width", "rows"),
    [(64, 96, None), (144, 32, 24), (144, 32, 4096), (16, 16, 8), (208, 48, 40), (208, 48, None)],
)
def test_pixels_are_those_of_the_undivided_decode(vaes, kind, height, width, rows):
    """Heights that bands divide and do not, of a single latent pixel, and in one band."""
    vae = vaes[kind]
    decoder = bands_of(vae, rows)
    latents = noise(latent_shape(vae, height, width), seed=height)
    expected = undivided(vae, latents)
    assert relative(decoded(decoder, latents), expected) < TOLERANCE


@pytest.mark.parametrize("kind", CAUSAL)
@pytest.mark.parametrize("num_frames", [5, 13])
@pytest.mark.parametrize("rows", [None, 40])
def test_frames_are_those_of_the_undivided_decode(vaes, kind, num_frames, rows):
    vae = vaes[kind]
    decoder = bands_of(vae, rows)
    latents = noise(latent_shape(vae, 176, 48, num_frames), seed=num_frames)
    expected = undivided(vae, latents)
    pixels = decoded(decoder, latents)
    assert pixels.shape[1] == num_frames
    assert relative(pixels, expected) < TOLERANCE


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
    vae = small("AutoencoderKL", seed, **options)
    decoder = bands_of(vae, 5)
    latents = noise((1, vae.config.latent_channels, 11, 7), seed)
    assert relative(decoded(decoder, latents), undivided(vae, latents)) < TOLERANCE


def test_statistics_far_from_zero(vaes):
    """A picture whose activations lie far from zero, beside its spread, and differ from band to band."""
    vae = copy.deepcopy(vaes["AutoencoderKL"])
    vae.decoder.conv_in.bias += 300.0
    decoder, exact = bands_of(vae, 3), copy.deepcopy(vae).double()
    latents = noise(latent_shape(vae, 128, 64)) * torch.linspace(0.01, 8, 16)[:, None]
    expected = undivided(exact, latents.double())
    assert relative(decoded(decoder, latents), expected) < 2 * relative(undivided(vae, latents), expected) + TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_as_near_to_the_truth_as_the_library_is(vaes, kind, dtype):
    low = copy.deepcopy(vaes[kind]).to(dtype)
    decoder, full = bands_of(low, 24), copy.deepcopy(low).float()
    latents = noise(latent_shape(low, 96, 64, 5), dtype=dtype)
    truth = undivided(full, latents.float())
    ours = decoded(decoder, latents)
    assert ours.dtype == dtype
    assert relative(ours, truth) < 1.25 * relative(undivided(low, latents), truth)


@pytest.mark.parametrize("kind", KINDS)
def test_channels_last(vaes, kind):
    vae = vaes[kind]
    latents = noise(latent_shape(vae, 96, 64))
    laid = copy.deepcopy(vae)
    if kind == "AutoencoderKL":
        laid.to(memory_format=torch.channels_last)
    decoder = bands_of(laid, 24)
    given = latents.contiguous(memory_format=torch.channels_last if latents.ndim == 4 else torch.channels_last_3d)
    assert relative(decoded(decoder, given), undivided(vae, latents)) < TOLERANCE


SIZES = [
    ("AutoencoderKL", 512, 512, 1),
    ("AutoencoderKL", 256, 328, 1),
    pytest.param("AutoencoderKL", 1024, 768, 1, marks=pytest.mark.slow),
    ("Wan 2.1", 256, 256, 9),
    ("Wan 2.1", 480, 832, 1),
    pytest.param("Wan 2.1", 136, 200, 17, marks=pytest.mark.slow),
    ("Wan 2.2", 256, 256, 9),
    ("Qwen-Image", 512, 512, 1),
    ("Qwen-Image", 1024, 1024, 1),
    ("Qwen-Image", 200, 136, 1),
]


@pytest.mark.parametrize(("kind", "height", "width", "num_frames"), SIZES)
def test_less_than_half_the_memory(kind, height, width, num_frames):
    vae = wide(kind)
    shape = latent_shape(vae, height, width, num_frames)
    whole = peak_activation_bytes(vae, shape, torch.float32)
    bands = peak_activation_bytes(vae, shape, torch.float32, BandPlan())
    assert bands < MOST * whole


def test_the_count_is_that_of_a_real_decode(vaes):
    from safelight.acceleration.activations import count_peak

    with torch.device("meta"):
        meta = AutoencoderKL(**group_norm_options(8, 16, 16, 32))
    shape = latent_shape(meta, 128, 96)
    decoder = bands_of(vaes["AutoencoderKL"])
    counted = peak_activation_bytes(meta, shape, torch.float32, BandPlan())
    latents = noise(shape)
    assert count_peak(lambda: decoded(decoder, latents)) == pytest.approx(counted, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_units_are_bounded_and_their_cost_is_that_of_the_work(kind):
    """The costs add up to the multiplications that torch counts in the undivided decode, about."""
    from torch.utils.flop_counter import FlopCounterMode

    vae = wide(kind)
    shape = latent_shape(vae, 256, 256, 5)
    decoder = decode_in_bands(vae, BandPlan(64))
    costs = [unit.cost for unit in decoder.units(shape)]
    latents = torch.empty(shape, device="meta")
    with FlopCounterMode(display=False) as counter:
        decoded(decoder, latents)
    assert 0.7 < 2 * sum(costs) / counter.get_total_flops() < 1.5
    assert max(costs) < sum(costs) / 4


@pytest.mark.parametrize("kind", KINDS)
def test_the_state_may_be_moved_between_any_two_units(vaes, kind):
    """Every tensor is replaced by a clone and the old one filled with NaN; dataclasses and lists are rebuilt."""
    from safelight.core.trees import map_tree

    def poisoned(tensor):
        clone = tensor.clone()
        tensor.fill_(float("nan"))
        return clone

    decoder = bands_of(vaes[kind], 40)
    latents = noise(latent_shape(vaes[kind], 96, 64, 9))
    expected = decoded(decoder, latents)
    state, pixels = decoder.begin(latents.clone()), torch.empty_like(expected)
    for unit in decoder.units(latents.shape):
        for piece in unit.run(state):
            frames, rows = piece.pixels.shape[1:3]
            pixels[:, piece.frame : piece.frame + frames, piece.top : piece.top + rows] = piece.pixels
        state = map_tree(state, poisoned)
    assert torch.equal(pixels, expected)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: AutoencoderTiny(), "AutoencoderTiny"),
        (lambda: AutoencoderKLHunyuanVideo(block_out_channels=(8, 8, 8, 8), norm_num_groups=4), "HunyuanVideo"),
        (lambda: AutoencoderKL(**{**group_norm_options(8, 16), "up_block_types": ATTENTION}), "AttnUpDecoderBlock2D"),
        (lambda: AutoencoderKL(**group_norm_options(8, 16, act_fn="gelu")), "gelu"),
        (lambda: AutoencoderKLWan(base_dim=4, attn_scales=[1.0]), None),
    ],
    ids=["tiny", "another causal", "attention in a block", "another activation", "attention scales"],
)
def test_what_cannot_be_divided_is_refused_with_the_reason(make, reason):
    vae = make()
    if reason is None:
        decode_in_bands(vae)  # these attentions are in the encoder alone
        return
    with pytest.raises(InvalidParameterError, match=f"vae_tiling.*{reason}"):
        decode_in_bands(vae)


def test_a_plan_of_no_rows_is_refused():
    with pytest.raises(InvalidParameterError, match="rows"):
        BandPlan(rows=0)


def test_rows_of_several_bands():
    whole = noise((1, 2, 11, 3))
    bands = Bands(bands=[whole[:, :, :4], whole[:, :, 4:5], whole[:, :, 5:]])
    for top in range(11):
        for bottom in range(top + 1, 12):
            assert torch.equal(bands.rows(top, bottom), whole[:, :, top:bottom])
    bands.release(5)
    assert (bands.first, len(bands.bands)) == (5, 1)
    assert torch.equal(bands.rows(6, 9), whole[:, :, 6:9])
