"""Latents as tokens of 2x2 latent pixels: there and back, and what a schedule starts from."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from safelight.core.shared_params import OWN_SIGMAS, TERMINAL_SHIFT
from safelight.stages.packed_latents import PackedLatentsConfig, unit_timestep
from tests.stages.stubs import request


def config(**changes):
    fields: dict[str, Any] = {"vae_scale_factor": 2, "latent_channels": 3, "vae_scale": 1.0, "vae_shift": 0.0}
    fields |= {"axes_dims_rope": (2, 2, 2), "own_sigmas": False, "shift_terminal": None, **changes}
    return PackedLatentsConfig(**fields)


@pytest.mark.parametrize(("height", "width"), [(4, 6), (8, 2)])
def test_tokens_are_two_by_two_latent_pixels(height, width):
    batch = request()
    latents = torch.arange(3.0 * height * width).view(1, 3, height, width)
    batch.raw_latent_shape = tuple(latents.shape)
    packed = config().maybe_pack_latents(latents, batch)
    assert isinstance(packed, torch.Tensor) and packed.shape == (1, height * width // 4, 12)
    assert packed[0, 0].tolist() == latents[0, :, :2, :2].reshape(3, 4).flatten().tolist()
    assert torch.equal(config().post_denoising_loop(packed, batch), latents)
    assert config().token_grids(batch) == [(height // 2, width // 2)]


def test_input_images_are_tokens_too():
    batch = request()
    assert config().image_tokens(batch, torch.float32) is None
    batch.image_latents = [torch.ones(1, 3, 4, 4), torch.zeros(1, 3, 2, 2)]
    tokens = config().image_tokens(batch, torch.float64)
    assert tokens is not None and tokens.shape == (1, 5, 12) and tokens.dtype == torch.float64
    assert tokens.sum().item() == 48


def test_what_the_solver_does_is_told():
    assert config(own_sigmas=True, shift_terminal=0.1).capabilities() == {OWN_SIGMAS, TERMINAL_SHIFT}
    assert config().capabilities() == frozenset() and config().size_multiple == 4
    assert config().own_defaults() == {"height": 256, "width": 256}


def test_a_timestep_is_rounded_before_it_is_divided():
    made = unit_timestep(torch.tensor(333.3), torch.zeros(2, 1, dtype=torch.bfloat16))
    assert made.tolist() == [float(torch.tensor(333.3).bfloat16() / 1000)] * 2
