"""Latent pixels into tokens and back: each 2x2 patch is a token."""

from __future__ import annotations

from torch import Tensor

PATCH_SIZE = 2
"""Latent pixels along one side of a token."""


def pack_latents(latents: Tensor) -> Tensor:
    """Return [B, H/2 * W/2, 4C] of latents [B, C, H, W], or [B, C, 1, H, W] of a VAE for videos."""
    b, c, *_, h, w = latents.shape
    patches = latents.view(b, c, h // PATCH_SIZE, PATCH_SIZE, w // PATCH_SIZE, PATCH_SIZE)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(b, -1, c * PATCH_SIZE**2)


def unpack_latents(tokens: Tensor, height: int, width: int) -> Tensor:
    """Return [B, C, H, W] of tokens [B, H/2 * W/2, 4C]; height and width in latent pixels."""
    b, _, channels = tokens.shape
    c = channels // PATCH_SIZE**2
    patches = tokens.view(b, height // PATCH_SIZE, width // PATCH_SIZE, c, PATCH_SIZE, PATCH_SIZE)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(b, c, height, width)
