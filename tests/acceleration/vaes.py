"""VAEs of the libraries: small ones with random weights to decode with, and of real width without weights."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, AutoencoderKLQwenImage, AutoencoderKLWan
from torch import Tensor, nn

from safelight.acceleration.activations import count_peak
from safelight.loading.vaes import decode_in_bands
from safelight.stages.vae import Decoder
from safelight.testing.recipes import shake

RESIDUAL = {
    "decoder_base_dim": 256,
    "base_dim": 160,
    "z_dim": 48,
    "is_residual": True,
    "patch_size": 2,
    "in_channels": 12,
    "out_channels": 12,
    "scale_factor_spatial": 16,
    "latents_mean": [0.0] * 48,
    "latents_std": [1.0] * 48,
}
KINDS = {
    "AutoencoderKL": (AutoencoderKL, {}),
    "Wan 2.1": (AutoencoderKLWan, {}),
    "Wan 2.2": (AutoencoderKLWan, RESIDUAL),
    "Qwen-Image": (AutoencoderKLQwenImage, {}),
}
CAUSAL = [kind for kind in KINDS if kind != "AutoencoderKL"]


def group_norm_options(*widths, **options):
    return {
        "down_block_types": ("DownEncoderBlock2D",) * len(widths),
        "up_block_types": ("UpDecoderBlock2D",) * len(widths),
        "block_out_channels": widths,
        "layers_per_block": 2,
        "latent_channels": 16,
        "norm_num_groups": min(32, widths[0] // 2),
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        **options,
    }


def small(kind, seed=0, **options):
    """Return a VAE of few channels whose parameters are all random."""
    cls, config = KINDS[kind]
    narrow = group_norm_options(8, 16, 16, 32) if kind == "AutoencoderKL" else {"base_dim": 4}
    if "decoder_base_dim" in config:
        narrow["decoder_base_dim"] = 4
    torch.manual_seed(seed)
    return shake(cls(**{**config, **narrow, **options}), seed).requires_grad_(False)


def wide(kind):
    """Return a VAE of the channels that the published ones have, on the meta device."""
    cls, config = KINDS[kind]
    with torch.device("meta"):
        return cls(**config or (group_norm_options(128, 256, 512, 512) if kind == "AutoencoderKL" else {})).eval()


def latent_shape(vae, height, width, num_frames=1):
    """Return the shape of the latents of so many pixels."""
    if type(vae) is AutoencoderKL:
        scale = 2 ** (len(vae.config.block_out_channels) - 1)
        return (1, vae.config.latent_channels, height // scale, width // scale)
    scale = 8 * (vae.config.get("patch_size") or 1)
    return (1, vae.config.z_dim, (num_frames - 1) // 4 + 1, height // scale, width // scale)


def undivided(vae, latents):
    """Return the library's own decode as [C, T, H, W]."""
    pixels = vae.decode(latents, return_dict=False)[0][0]
    return pixels if pixels.ndim == 4 else pixels[:, None]


def relative(value, reference):
    """Return how far a tensor is from another, in units of its norm."""
    exact = reference.detach().double()
    return float((value.detach().double() - exact).norm() / exact.norm())


def picture_vae(seed, widths=(128, 128)):
    """Return an `AutoencoderKL` with channels enough for convolutions of fewer multiplications."""
    torch.manual_seed(seed)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=widths,
        layers_per_block=1,
        latent_channels=4,
    )
    for parameter in vae.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    return vae.eval().requires_grad_(False)


def decoded(decoder: Decoder, latents: Tensor) -> Tensor:
    """Return the pixels [C, T, H, W] of the latents of one picture or video, decoded at once in bands."""
    pixels = torch.empty(decoder.output_shape(latents.shape), dtype=latents.dtype, device=latents.device)
    state = decoder.begin(latents)
    for unit in decoder.units(latents.shape):
        for piece in unit.run(state):
            num_frames, rows = piece.pixels.shape[1:3]
            pixels[:, piece.frame : piece.frame + num_frames, piece.top : piece.top + rows] = piece.pixels
    return pixels


def peak_activation_bytes(vae, shape, in_bands):
    """Return the most bytes of activations that are alive while a VAE on the meta device decodes, its pixels too."""
    nn.Module.to(vae, torch.float32)  # the library's own speaks of weights, of which there are none
    latents = torch.empty(shape, device="meta")
    if in_bands:
        decoder = decode_in_bands(vae)
        return count_peak(lambda: decoded(decoder, latents))
    return count_peak(lambda: vae.decode(latents, return_dict=False)[0])
