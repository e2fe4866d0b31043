"""Decoding with a causal video VAE of the libraries, one frame at a time, with what it remembers outside its modules.

The libraries' decoders keep the frames that their convolutions look back on in the module, and push the frames of a
latent frame through all blocks together. Here they are a walk over the same modules, in less memory and time:

- behind each doubling of frames the rest of the decoder runs for one frame after the other;
- a convolution over three frames is one over each of them, in two dimensions, with the channels last, and frames
  before the first, which are zero, are not computed;
- one over doubled pixels is four over the pixels themselves.

Results are the same up to the order of sums.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

FeatureCache = dict[str, list[Any]]
"""By the name of each convolution that looks back: the inputs of the last two frames, [1, C, H, W] each, the older
first; of the last convolution, which makes few channels of many, what they add to the next two frames."""

NORM_EPS = 1e-12
BAND_ROWS = 64
"""Rows that a convolution makes at a time, where it adds to what is there already."""


class CausalDecoder:
    """The walk over the decoder of one of the libraries' causal VAEs, whose modules are named and made alike.

    Args:
        vae: the library's module. The memory of its decoder's weights is rearranged, their values stay.

    """

    def __init__(self, vae: Any) -> None:
        self.vae = vae
        self.decoder = vae.decoder
        self.names = {module: name for name, module in self.decoder.named_modules() if isinstance(module, nn.Conv3d)}
        for module in self.decoder.modules():
            if isinstance(module, nn.Conv2d | nn.Conv3d):
                module.weight.data = channels_last(module.weight.data)

    def decode(self, latents: Tensor, cache: FeatureCache) -> Iterator[Tensor]:
        """Yield the frames [1, C, H, W], in [-1, 1], of one latent frame: one of the first, several of others.

        Args:
            latents: [1, C, 1, H, W].
            cache: of this video, changed in place; empty before the first latent frame.

        """
        first, mid = not cache, self.decoder.mid_block
        frame = self.vae.post_quant_conv(latents)[:, :, 0].contiguous(memory_format=torch.channels_last)
        frame = self._conv(self.decoder.conv_in, frame, cache)
        frame = self._residual(mid.resnets[0], frame, cache)
        for attention, resnet in zip(mid.attentions, mid.resnets[1:], strict=True):
            frame = self._residual(resnet, self._attended(attention, frame), cache)
        for decoded in self._up(0, iter([frame]), first, cache):
            pixels = self._last_conv(activated(self.decoder.norm_out, decoded), cache)
            del decoded  # or it would be kept while the next is made
            yield unpatchified(pixels, self.vae.config.get("patch_size") or 1).clamp_(-1.0, 1.0)

    def _up(self, level: int, frames: Iterator[Tensor], first: bool, cache: FeatureCache) -> Iterator[Tensor]:
        """Yield the frames behind the blocks from `level` on, each before the next is begun."""
        if level == len(self.decoder.up_blocks):
            yield from frames
            return
        for frame in frames:
            yield from self._up(level + 1, self._up_block(level, frame, first, cache), first, cache)

    def _up_block(self, level: int, frame: Tensor, first: bool, cache: FeatureCache) -> Iterator[Tensor]:
        """Yield what a block makes of a frame: one, or two where it doubles them and this is not the first."""
        block = self.decoder.up_blocks[level]
        parts = dict(block.named_children())
        shortcut = parts["avg_shortcut"](frame[:, :, None], first_chunk=first) if "avg_shortcut" in parts else None
        for resnet in block.resnets:
            frame = self._residual(resnet, frame, cache)
        frames, upsamplers = [frame], [parts["upsampler"]] if "upsampler" in parts else parts.get("upsamplers", ())
        for upsampler in upsamplers:
            if upsampler.mode == "upsample3d" and not first:
                frames = [half.clone() for half in self._conv(upsampler.time_conv, frame, cache).chunk(2, dim=1)]
        del frame
        for index in range(len(frames)):
            made = frames.pop(0)  # only now made larger, and not kept
            for upsampler in upsamplers:
                made = self._doubled(upsampler.resample[-1], made)
            yield made if shortcut is None else made.add_(shortcut[:, :, index])
            del made

    def _attended(self, attention: Any, frame: Tensor) -> Tensor:
        """Return what attention, each pixel with each, makes of a frame [1, C, H, W]."""
        attended: Tensor = attention(frame[:, :, None])[:, :, 0]
        return attended

    def _doubled(self, conv: Any, frame: Tensor) -> Tensor:
        """Return a convolution over a frame whose pixels are doubled, [1, C_out, 2H, 2W]."""
        return doubled_conv(conv, frame)

    def _residual(self, block: Any, frame: Tensor, cache: FeatureCache) -> Tensor:
        """Return two convolutions, each of norm and activation, added to the frame, whose memory is used for others."""
        convolved = self._of_earlier(block.conv2, frame, cache)  # at once, which lets go of its oldest frame
        shortcut = block.conv_shortcut
        convolved += self._conv(shortcut, frame, cache) if shortcut in self.names else frame
        hidden_states = self._of_earlier(block.conv1, frame, cache)
        self._add(hidden_states, block.conv1, activated(block.norm1, frame), cache)
        self._add(convolved, block.conv2, activated(block.norm2, hidden_states), cache)
        return convolved

    def _conv(self, conv: Any, frame: Tensor, cache: FeatureCache) -> Tensor:
        """Return a causal convolution at this frame, [1, C, H, W]."""
        convolved = self._of_earlier(conv, frame, cache)
        self._add(convolved, conv, frame, cache)
        return convolved

    def _of_earlier(self, conv: Any, like: Tensor, cache: FeatureCache) -> Tensor:
        """Return the bias and what the remembered frames add to this one, of the size of `like`; forget the oldest."""
        before, num_taps = cache.setdefault(self.names[conv], []), conv.weight.shape[2]
        bias: Tensor = conv.bias[:, None, None]
        if 1 < num_taps == len(before) + 1 and conv.in_channels == conv.out_channels:
            convolved = conv_in_place(before.pop(0), conv.weight[:, :, 0]).add_(bias)
        else:
            convolved = bias.expand(1, -1, *like.shape[2:]).contiguous(memory_format=torch.channels_last)
        for age in range(len(before), 0, -1):
            add_conv(convolved, before[-age], conv.weight[:, :, -1 - age])
            if age == num_taps - 1:
                del before[0]
        return convolved

    def _add(self, convolved: Tensor, conv: Any, frame: Tensor, cache: FeatureCache) -> None:
        """Add what this frame itself adds, in place, and remember the frame if the convolution looks back."""
        add_conv(convolved, frame, conv.weight[:, :, -1])
        if conv.weight.shape[2] > 1:
            cache[self.names[conv]].append(frame)

    def _last_conv(self, frame: Tensor, cache: FeatureCache) -> Tensor:
        """Return the last convolution at this frame, [1, C, H, W], and remember what the frame adds to the next two."""
        conv = self.decoder.conv_out
        now, soon, later = (F.conv2d(frame, conv.weight[:, :, tap], padding=1) for tap in (2, 1, 0))
        before = cache.get(self.names[conv])
        cache[self.names[conv]] = [soon, later] if before is None else [soon + before[1], later]
        now += conv.bias[:, None, None]
        return now if before is None else now + before[0]


def channels_last(weight: Tensor) -> Tensor:
    """Return a convolution's weight so that its channels, or those of each of its frames, lie last in memory."""
    if weight.ndim == 4:
        return weight.contiguous(memory_format=torch.channels_last)
    return weight.permute(2, 0, 3, 4, 1).contiguous().permute(1, 4, 0, 2, 3)


def add_conv(convolved: Tensor, frame: Tensor, weight: Tensor) -> None:
    """Add to [1, C_out, H, W] a convolution of a frame [1, C, H, W], in place, some rows at a time."""
    height, halo = frame.shape[2], weight.shape[2] // 2
    for top in range(0, height, BAND_ROWS):
        bottom = min(top + BAND_ROWS, height)
        above, below = min(top, halo), min(height - bottom, halo)  # rows there are beyond the band, of those it needs
        band = frame[:, :, top - above : bottom + below]
        convolved[:, :, top:bottom] += F.conv2d(band, weight, padding=halo)[:, :, above : above + bottom - top]


def conv_in_place(frame: Tensor, weight: Tensor) -> Tensor:
    """Replace a frame [1, C, H, W] by a convolution of it, of as many channels, some rows at a time; return it."""
    height, halo = frame.shape[2], weight.shape[2] // 2
    above = None  # the last rows of the band before, as they were
    for top in range(0, height, BAND_ROWS):
        bottom = min(top + BAND_ROWS, height)
        rows = frame[:, :, top : bottom + halo]
        band = rows if above is None else torch.cat((above, rows), dim=2)
        first = 0 if above is None else halo
        above = frame[:, :, bottom - halo : bottom].clone()
        frame[:, :, top:bottom] = F.conv2d(band, weight, padding=halo)[:, :, first : first + bottom - top]
    return frame


def doubled_conv(conv: Any, frame: Tensor) -> Tensor:
    """Return a convolution of 3 by 3 over a frame whose pixels are doubled along both sides, [1, C_out, 2H, 2W].

    Three neighbours among doubled pixels are two pixels, one of them twice, whose weights are summed.
    """
    height, width = frame.shape[2:]
    shape = (1, conv.weight.shape[0], 2 * height, 2 * width)
    convolved = torch.empty(shape, dtype=frame.dtype, device=frame.device, memory_format=torch.channels_last)
    for row in (0, 1):
        rows = torch.stack(merged(conv.weight.unbind(2), row), dim=2)
        for column in (0, 1):
            weight = torch.stack(merged(rows.unbind(3), column), dim=3).contiguous(memory_format=torch.channels_last)
            made = F.conv2d(frame, weight, conv.bias, padding=1)
            convolved[:, :, row::2, column::2] = made[:, :, row : row + height, column : column + width]
    return convolved


def merged(taps: tuple[Tensor, ...], second: int) -> tuple[Tensor, Tensor]:
    """Return the weights of two pixels of three taps around the first, or the second, of a doubled pixel."""
    before, at, after = taps
    return (before + at, after) if second else (before, at + after)


def activated(norm: Any, frame: Tensor) -> Tensor:
    """Make a frame SiLU of its RMS norm over channels, [B, C, H, W]; lengths are computed in float32."""
    length = torch.linalg.vector_norm(frame, dim=1, keepdim=True, dtype=torch.float32)
    frame = torch.mul(frame, norm.scale / length.clamp_min(NORM_EPS), out=frame)
    return F.silu(frame.mul_(norm.gamma.view(-1, 1, 1)), inplace=True)


def patchified(pixels: Tensor, patch_size: int) -> Tensor:
    """Return [B, C * patch * patch, T, H, W] of pixels [B, C, T, H * patch, W * patch], columns of a patch first."""
    b, c, t, height, width = pixels.shape
    patches = pixels.view(b, c, t, height // patch_size, patch_size, width // patch_size, patch_size)
    return patches.permute(0, 1, 6, 4, 2, 3, 5).flatten(1, 3)


def unpatchified(pixels: Tensor, patch_size: int) -> Tensor:
    """Return [B, C, H, W] of pixels in patches, [B, C * patch * patch, H, W], columns of a patch first."""
    patches = pixels.reshape(pixels.shape[0], -1, patch_size, patch_size, *pixels.shape[2:])  # B C w h H W
    return patches.permute(0, 1, 4, 3, 5, 2).flatten(4, 5).flatten(2, 3)
