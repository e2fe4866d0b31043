"""Decoding with a VAE in bands of rows: the pixels of the undivided decode in less than half the memory.

The libraries' own tiling normalises each tile by itself and blends the seams, which changes the picture; this does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from safelight.acceleration.activations import count_peak
from safelight.acceleration.causal_bands import CausalBandDecoder, why_not_causal
from safelight.acceleration.group_norm_bands import GroupNormBandDecoder, why_not_group_norm
from safelight.errors import InvalidParameterError
from safelight.stages.vae import UNIT_COST, Decoder

SETTING = "vae_tiling"
"""The setting of the engine that asks for bands."""


@dataclass(frozen=True)
class BandPlan:
    """How finely a decode is divided.

    Attributes:
        rows: of the picture, that a band has at most, 1 or more; None leaves it to the decoder. Fewer take less
            memory; where halos are decoded twice they take more time.
        unit_cost: multiplications between two boundaries; a single unit may have more.

    """

    rows: int | None = None
    unit_cost: int = UNIT_COST

    def __post_init__(self) -> None:
        """Refuse bands without rows."""
        if self.rows is not None and self.rows < 1:
            raise InvalidParameterError("rows", self.rows, "1 or more, or None")


def decode_in_bands(vae: Any, plan: BandPlan | None = None) -> Decoder:
    """Return the decoder in bands of a VAE.

    Args:
        vae: the library's module, loaded or on the meta device. The memory of its decoder's weights is rearranged,
            their values stay.
        plan: how finely it divides.

    Raises:
        InvalidParameterError: if this kind of VAE cannot be decoded in bands, with the reason.

    """
    rows = (plan or BandPlan()).rows
    group_norm = type(vae).__name__ == "AutoencoderKL"
    reason = why_not_group_norm(vae) if group_norm else why_not_causal(vae)
    if reason is not None:
        raise InvalidParameterError(SETTING, "exact", f"none with {type(vae).__name__}: {reason}")
    return GroupNormBandDecoder(vae, rows) if group_norm else CausalBandDecoder(vae, rows)


def decoded(decoder: Decoder, latents: Tensor) -> Tensor:
    """Return the pixels [C, T, H, W] of the latents of one picture or video, decoded at once.

    Args:
        decoder: from `decode_in_bands`.
        latents: [1, C, H, W] or [1, C, T, H, W], as the VAE takes them.

    """
    shape = decoder.output_shape(latents.shape)
    pixels = torch.empty(shape, dtype=latents.dtype, device=latents.device)
    state = decoder.begin(latents)
    for unit in decoder.units(latents.shape):
        for piece in unit.run(state):
            num_frames, rows = piece.pixels.shape[1:3]
            pixels[:, piece.frame : piece.frame + num_frames, piece.top : piece.top + rows] = piece.pixels
    return pixels


def peak_activation_bytes(
    vae: Any, latent_shape: Sequence[int], dtype: torch.dtype, plan: BandPlan | None = None
) -> int:
    """Return the most bytes of activations that are alive while a VAE decodes, its pixels in `dtype` among them.

    Args:
        vae: the library's module on the meta device, so that no weights are needed and nothing is computed. Its
            parameters become of `dtype`.
        latent_shape: [B, C, H, W] or [B, C, T, H, W]. In bands one is decoded after the other.
        dtype: of weights and activations.
        plan: of the bands; None for the undivided decode of the library.

    Raises:
        InvalidParameterError: if there is a plan and this kind of VAE cannot be decoded in bands.

    """
    assert vae.device.type == "meta", "counting is for modules without weights"
    nn.Module.to(vae, dtype)  # the library's own speaks of weights, of which there are none
    if plan is None:
        latents = torch.empty(tuple(latent_shape), dtype=dtype, device="meta")
        return count_peak(lambda: vae.decode(latents, return_dict=False)[0])
    decoder = decode_in_bands(vae, plan)
    latents = torch.empty((1, *latent_shape[1:]), dtype=dtype, device="meta")
    return count_peak(lambda: decoded(decoder, latents))
