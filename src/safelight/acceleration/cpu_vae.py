"""The libraries' VAE for pictures on the CPU: channels last, fewer multiplications, and no needless copies."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from safelight.acceleration.cpu import CpuPlan
from safelight.acceleration.group_norm import group_norm_silu
from safelight.acceleration.winograd import TILE, winograd_conv2d
from safelight.layers.bands import cuts

MIN_CHANNELS = 128
"""Fewer channels, of input or output, are convolved by the definition: turning windows would cost what it saves."""

MIN_TILES = 256
"""So are pictures of fewer tiles, for which turning the weights would."""

BAND_VALUES = 1 << 20
"""Values of a band that is cast to float32: four megabytes."""


class WidenedConv2d(nn.Conv2d):
    """A bfloat16 convolution computed in float32 and rounded once. Weights are cast at each call.

    One that keeps a picture's size is made a band of rows at a time, so that no picture is cast as a whole.
    """

    def forward(self, pixels: Tensor) -> Tensor:
        """Return [B, C_out, H, W], bfloat16."""
        weight, bias = self.weight.float(), None if self.bias is None else self.bias.float()
        if not _keeps_size(self):
            whole: Tensor = self._conv_forward(pixels.float(), weight, bias)
            return whole.to(pixels.dtype)
        halo = self.kernel_size[0] // 2
        batch, channels, height, width = pixels.shape
        shape = (batch, self.out_channels, height, width)
        convolved = torch.empty(shape, dtype=pixels.dtype, device=pixels.device, memory_format=torch.channels_last)
        for top, bottom in cuts(height, max(1, BAND_VALUES // (batch * channels * width))):
            above, below = min(top, halo), min(height - bottom, halo)
            rows = F.pad(pixels[:, :, top - above : bottom + below].float(), (0, 0, halo - above, halo - below))
            convolved[:, :, top:bottom] = F.conv2d(rows, weight, bias, padding=(0, halo), groups=self.groups)
        return convolved


class WinogradConv2d(WidenedConv2d):
    """A convolution of 3 by 3 with a quarter of the multiplications where the picture is large, in float32."""

    def forward(self, pixels: Tensor, norm: nn.GroupNorm | None = None, doubled: bool = False) -> Tensor:
        """Return [B, C_out, H, W], or twice the sides, in the dtype of the pixels; arguments as `winograd_conv2d`'s."""
        height, width = (side * (1 + doubled) for side in pixels.shape[2:])
        if (-(-height // TILE)) * (-(-width // TILE)) >= MIN_TILES:
            return winograd_conv2d(pixels, self.weight, self.bias, norm, doubled)
        pixels = pixels if norm is None else group_norm_silu(pixels, norm)
        return super().forward(F.interpolate(pixels, scale_factor=2.0) if doubled else pixels)


class InPlaceResidual(nn.Module):
    """The libraries' residual block without needless copies: the sum is made in place, activations with the norm.

    Args:
        block: a `ResnetBlock2D` without embedded time, whose parts are taken by the names that they have.

    """

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.norm1, self.conv1 = block.norm1, block.conv1
        self.norm2, self.conv2 = block.norm2, block.conv2
        self.conv_shortcut = block.conv_shortcut

    def forward(self, input_tensor: Tensor, temb: None = None) -> Tensor:
        """Return [B, C_out, H, W]."""
        hidden_states = _normed_conv(self.norm2, self.conv2, _normed_conv(self.norm1, self.conv1, input_tensor))
        shortcut = input_tensor if self.conv_shortcut is None else self.conv_shortcut(input_tensor)
        total: Tensor = hidden_states.add_(shortcut)
        return total


class DoublingConv(nn.Module):
    """The libraries' doubling of a picture's sides and the convolution after it, without the picture between them.

    Args:
        conv: the convolution.

    """

    def __init__(self, conv: WinogradConv2d) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return [B, C_out, 2H, 2W]."""
        doubled: Tensor = self.conv(hidden_states, doubled=True)
        return doubled


def _normed_conv(norm: nn.GroupNorm, conv: nn.Module, pixels: Tensor) -> Tensor:
    """Return a convolution of SiLU of a norm."""
    routed = isinstance(conv, WinogradConv2d)
    convolved: Tensor = conv(pixels, norm) if routed else conv(group_norm_silu(pixels, norm))
    return convolved


def accelerate_vae(vae: Any, plan: CpuPlan) -> None:
    """Have the convolutions and residual blocks of an `AutoencoderKL` computed faster, in place. Parameters stay.

    Args:
        vae: the library's module, with its weights in their final dtype.
        plan: of this processor.

    """
    if plan.channels_last:
        vae.to(memory_format=torch.channels_last)
        route_convolutions(vae, widen=plan.widened_bfloat16)
        without_copies(vae)


def route_convolutions(module: nn.Module, widen: bool) -> None:
    """Have convolutions computed faster, in place: they become of a subclass without state of its own.

    Args:
        module: whose convolutions, at any depth, are routed.
        widen: whether bfloat16 is computed in float32; without it, bfloat16 convolutions stay torch's.

    """
    for conv in module.modules():
        if type(conv) is not nn.Conv2d:
            continue
        half = conv.weight.dtype is torch.bfloat16
        if _is_plain_3x3(conv) and (conv.weight.dtype is torch.float32 or (half and widen)):
            conv.__class__ = WinogradConv2d
        elif half and widen:
            conv.__class__ = WidenedConv2d


class NormSiLU(nn.GroupNorm):
    """A group norm and its SiLU, over channels last."""

    def forward(self, pixels: Tensor) -> Tensor:
        """Return [B, C, H, W]."""
        return group_norm_silu(pixels, self)


def without_copies(vae: Any) -> None:
    """Replace blocks and last norms of an `AutoencoderKL` by ones that copy less."""
    for block in vae.decoder.up_blocks:
        for index, upsampler in enumerate(block.upsamplers or ()):
            if isinstance(upsampler.conv, WinogradConv2d):
                block.upsamplers[index] = DoublingConv(upsampler.conv).train(vae.training)
    if vae.config.act_fn != "silu":
        return
    parts = [block for half in (vae.encoder.down_blocks, vae.decoder.up_blocks) for block in half]
    parts += [vae.encoder.mid_block, vae.decoder.mid_block]
    for part in parts:
        part.resnets = nn.ModuleList(InPlaceResidual(block) for block in part.resnets).train(vae.training)
    for half in (vae.encoder, vae.decoder):
        half.conv_norm_out.__class__, half.conv_act = NormSiLU, nn.Identity()


def _keeps_size(conv: nn.Conv2d) -> bool:
    """Return whether a convolution makes as many pixels as it is given, with zeros around, from a square of them."""
    side = conv.kernel_size[0]
    return (
        conv.kernel_size == (side, side)
        and side % 2 == 1
        and conv.stride == conv.dilation == (1, 1)
        and conv.padding == (side // 2, side // 2)
        and conv.padding_mode == "zeros"
    )


def _is_plain_3x3(conv: nn.Conv2d) -> bool:
    """Return whether a convolution is of 3 by 3, makes as many pixels as it is given, and has channels enough."""
    enough = min(conv.in_channels, conv.out_channels) >= MIN_CHANNELS
    return _keeps_size(conv) and conv.kernel_size == (3, 3) and conv.groups == 1 and enough
