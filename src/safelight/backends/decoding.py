"""A VAE's decode within a pipeline's call, made in bands: several calls, and what the package takes for one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from safelight.stages.vae import VAE

COMPONENT, METHOD = "vae", "decode"
INPUT = "input"
"""Place in a decoder's state of what has not begun."""

Make = Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]]
"""Has some units of a decode made, given the state and what they are of; returns the state behind them and pieces."""


def decode_in_units(vae: VAE, arguments: Mapping[str, Any], make: Make) -> Any:
    """Decode latents, one picture or video after the other.

    Args:
        vae: has a decoder.
        arguments: of the package's `decode`: `z`, latents [B, C, H, W] or [B, C, T, H, W], and `return_dict`.
        make: has units made.

    Returns:
        What the package's `decode` returns.

    """
    assert vae.decoder is not None
    latents: Tensor = arguments["z"]
    one = (1, *latents.shape[1:])
    pixels = latents.new_empty((latents.shape[0], *vae.decoder.output_shape(one)))  # B C T H W
    for picture, rows in zip(pixels, latents, strict=True):
        state: dict[str, Any] = {INPUT: rows[None]}
        for units in vae.calls(one):
            made = make({"state": state}, {"latent_shape": one, "units": units})
            state = made["state"]
            for piece in made["pieces"]:
                num_frames, num_rows = piece.pixels.shape[1:3]
                place = picture[:, piece.frame : piece.frame + num_frames, piece.top : piece.top + num_rows]
                place.copy_(piece.pixels)
    whole = pixels if latents.ndim == 5 else pixels.squeeze(2)
    if not arguments.get("return_dict", True):
        return (whole,)
    from diffusers.models.autoencoders.vae import DecoderOutput

    return DecoderOutput(sample=whole)
