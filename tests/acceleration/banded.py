"""What every decoder in bands must do, against the undivided decode of the diffusers package."""

from __future__ import annotations

import copy

import torch

from safelight.core.trees import map_tree
from safelight.loading.vaes import decode_in_bands
from tests.acceleration.vaes import decoded, latent_shape, peak_activation_bytes, relative, undivided, wide

TOLERANCE = 1e-5
MOST = 0.45
SIZES = [(64, 96, None), (144, 32, 24), (144, 32, 4096), (16, 16, 8), (208, 48, 40), (208, 48, None)]
"""Height, width and rows of a band: heights that bands divide and do not, of a single latent pixel, and in one band."""


def bands_of(vae, rows=None):
    return decode_in_bands(copy.deepcopy(vae), rows)


def noise(shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@torch.no_grad()
def off_by(vae, latents, rows=None):
    """Return how far pixels made in bands are from those of the undivided decode."""
    return relative(decoded(bands_of(vae, rows), latents), undivided(vae, latents))


@torch.no_grad()
def check_low_precision(vae, dtype):
    """Pixels are as near to the truth as the library's are."""
    low = copy.deepcopy(vae).to(dtype)
    latents = noise(latent_shape(low, 96, 64, 5), dtype=dtype)
    truth = undivided(copy.deepcopy(low).float(), latents.float())
    ours = decoded(bands_of(low, 24), latents)
    assert ours.dtype == dtype
    assert relative(ours, truth) < 1.25 * relative(undivided(low, latents), truth)


@torch.no_grad()
def check_memory(kind, height, width, num_frames=1):
    """Less than half the bytes of activations."""
    vae = wide(kind)
    shape = latent_shape(vae, height, width, num_frames)
    assert peak_activation_bytes(vae, shape, in_bands=True) < MOST * peak_activation_bytes(vae, shape, in_bands=False)


@torch.no_grad()
def check_costs(kind):
    """The costs of units add up to the multiplications that torch counts in the undivided decode, about."""
    from torch.utils.flop_counter import FlopCounterMode

    vae = wide(kind)
    shape = latent_shape(vae, 256, 256, 5)
    decoder = decode_in_bands(vae, 64)
    costs = [unit.cost for unit in decoder.units(shape)]
    latents = torch.empty(shape, device="meta")
    with FlopCounterMode(display=False) as counter:
        decoded(decoder, latents)
    assert 0.7 < 2 * sum(costs) / counter.get_total_flops() < 1.5
    assert max(costs) < sum(costs) / 4


@torch.no_grad()
def check_moved_state(vae):
    """Between any two units every tensor is replaced by a clone and the old one filled with NaN."""

    def poisoned(tensor):
        clone = tensor.clone()
        tensor.fill_(float("nan"))
        return clone

    decoder = bands_of(vae, 40)
    latents = noise(latent_shape(vae, 96, 64, 9))
    expected = decoded(decoder, latents)
    state, pixels = decoder.begin(latents.clone()), torch.empty_like(expected)
    for unit in decoder.units(latents.shape):
        for piece in unit.run(state):
            frames, rows = piece.pixels.shape[1:3]
            pixels[:, piece.frame : piece.frame + frames, piece.top : piece.top + rows] = piece.pixels
        state = map_tree(state, poisoned)
    assert torch.equal(pixels, expected)
